"""The options of a compression run, and the check that refuses values that cannot work."""

import math
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.quantization import FP8, GROUP_SIZES, INT8, Scheme, int4

BASELINES = ("svd", "asvd", "svd-llm", "pifa")
BUILTIN, SELF = "python-docs", "self"
LOCAL, RAY = "local", "ray"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_RATIO = 0.2
HEAD_TOLERANCE = 0.02
# Default number of calibration samples: windows of text or images with descriptions, and pairs for dual encoders.
WINDOWS, PAIRS = 128, 1024
# The same where a CPU samples the text, which takes as long as calibrating on it: SmolLM2-135M then takes a quarter of
# an hour on two cores.
CPU_WINDOWS = 40
# On a GPU text models get up to GPU_GROWTH times as many windows and tokens of knowledge distillation, as far as each
# takes ten minutes at most at 100 TFLOP/s.
GPU_GROWTH, GPU_FLOPS = 4, 6e16
# FLOPs of calibration per parameter and token: a forward pass, and Gram matrices in float32 at a sixteenth of the rate.
CALIBRATION_FLOPS = 32
# Held-out windows of the text: knowledge distillation never trains on them and selects its result by them.
HELD_OUT = 8
# Windows of a text that gives up its share of them for the default amount of distillation; shorter ones do not.
GENEROUS_WINDOWS = 64
AUTO = "auto"
# The values of `bits`, and the quantizations that each allows; None keeps the dtype. `auto` chooses among several.
BITS: dict[str, tuple[Scheme | None, ...]] = {
    "16": (None,),
    "8": (INT8,),
    "fp8": (FP8,),
    "4": (int4(32),),
    AUTO: (None, INT8, *(int4(size) for size in GROUP_SIZES)),
}
# Tokens of knowledge distillation that are the default: the first 100 windows bring most of what more of them bring.
DISTILLED_TOKENS = 102400
# Tokens that shorter windows have together at most in a step of distillation; the rates are for windows of 1024.
STEP_TOKENS = 1024
# Passes over the text that the default makes at most.
DISTILLED_PASSES = 2
# Windows of the model's own text that are sampled for each minute of knowledge distillation, beside the calibration
# windows: two cores train on SmolLM2-135M with 25 windows a minute, and sampling one takes as long as training on one.
FRESH_WINDOWS = 5
# The same as a share of an amount in tokens.
FRESH_SHARE = 0.2


@dataclass(frozen=True)
class Dose:
    """An amount of knowledge distillation, in minutes or in tokens.

    Attributes:
        minutes: of training and evaluation; None if the amount is in tokens.
        tokens: to train on; None if the amount is in minutes.
        by_default: whether the user has not asked for it, so that it may be left out.
    """

    minutes: float | None = None
    tokens: int | None = None
    by_default: bool = False

    def more_than(self, text: int) -> bool:
        """Whether the amount may exceed so many tokens."""
        return self.tokens is None or self.tokens > text

    def part(self, share: float) -> "Dose":
        """A share of the amount."""
        minutes = None if self.minutes is None else share * self.minutes
        return replace(
            self, minutes=minutes, tokens=None if self.tokens is None else max(1, round(share * self.tokens))
        )

    def on(self, text: int) -> "Dose":
        """The amount for so many tokens to train on: the default makes DISTILLED_PASSES passes at most."""
        if self.tokens is None or not self.by_default:
            return self
        return replace(self, tokens=min(self.tokens, DISTILLED_PASSES * text))


@dataclass(frozen=True)
class CompressOptions:
    """What the user asks for: one field for each option of the command line.

    Attributes:
        model: local folder or hub id.
        output: folder to write; must not exist.
        ratio: share of the projections' parameters to remove, 0 to 1, or of their GEMM latency if `costs` is given.
            A dict has one share per tower; towers that it does not name stay dense. With `bits` auto it is a share of
            the projections' bytes.
        tolerance: relative output error allowed in every projection, instead of `ratio`; a dict has one per tower.
        target_bytes: largest size of the written weights in bytes, instead of `ratio`.
        target_loss: largest predicted loss in nats per token, instead of `ratio`: the smallest model within it.
        target_latency: largest GEMM time of all projections in milliseconds, by the table `costs`, instead of `ratio`.
        sensitivity: `measured`, `forward` or `uniform`. None is `uniform` with a tolerance or a baseline; otherwise it
            is `measured`, or `forward` if gradients do not fit in memory.
        baseline: one of `BASELINES`, used instead of PGSVD for comparison; None for PGSVD.
        form: `pivot` or `factors`; None is `pivot` if sensitivities are measured, but for matrices of 4 bits and for
            models that a GPU serves.
        serve_on: `cpu` or `gpu`, where the model will be served; None for the kind of machine that `costs` are of, else
            for that of `device`.
        sequential: whether each layer is fitted to activations from the already factored layers (see
            `factors.error_aware`); None is yes if sensitivities are measured.
        refine: minutes of knowledge distillation (see `refine.distill`), 0 for none; None for the default (see
            `planning.dose`) if `refine_tokens` is None as well.
        refine_tokens: tokens of knowledge distillation, instead of minutes.
        bits: of the stored weights of the projections, a key of BITS; `auto` needs a `ratio` or `target_bytes`.
        costs: JSON file with GEMM latencies (see `format.latency_table`) that the ranks minimize; None for size.
        dataset: names, files or folders of the calibration data; each gives an equal share of the samples. None is text
            that the model samples from itself, or `python-docs` if it cannot.
        num_calibration_samples: windows of text, or image-text pairs; None for `WINDOWS` or `PAIRS`, `CPU_WINDOWS` of
            the model's own text on a CPU, and up to `GPU_GROWTH` times `WINDOWS` of text on a GPU.
        max_seq_length: tokens per window.
        text_column: field of a row of text data sets that holds its text or conversation; None for the usual names.
        chat_template: whether plain text is formatted as user and assistant turns with the model's chat template.
        seed: of the draws of windows, pairs and labels.
        ignore: shell patterns of projections that stay dense; they count as kept.
        include: modules that are compressed only on request: `experts` (MoE experts) and `lm_head`.
        head_tolerance: relative error allowed in the LM head's weighted logits.
        calibration: folder that keeps the calibration results for other runs; None for a folder of this run alone.
        dtype: of the written tensors and of calibration; `auto` keeps each tensor's own.
        device: that computes; `auto` is a GPU if torch sees one.
        memory_budget: bytes of memory of the device that the run may take; None for what is free.
        executor: what runs the calibration samples and the solvers: `local` this process, `ray` workers of a cluster.
        address: of the Ray cluster; None for a new one on this machine.
        resume: continue an interrupted run.
        revision: branch, tag or commit of a hub id; None for main.
        trust_remote_code: run modelling code from the model's repository.
        command: the command line, for the checkpoint's description.
    """

    model: str
    output: Path
    ratio: float | dict[str, float] | None = None
    tolerance: float | dict[str, float] | None = None
    target_bytes: int | None = None
    target_loss: float | None = None
    target_latency: float | None = None
    sensitivity: str | None = None
    baseline: str | None = None
    form: str | None = None
    serve_on: str | None = None
    sequential: bool | None = None
    refine: float | None = None
    refine_tokens: int | None = None
    bits: str = "16"
    costs: Path | None = None
    dataset: tuple[str, ...] | None = None
    num_calibration_samples: int | None = None
    max_seq_length: int = 1024
    text_column: str | None = None
    chat_template: bool = False
    seed: int = 0
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    head_tolerance: float = HEAD_TOLERANCE
    calibration: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    memory_budget: int | None = None
    executor: str = LOCAL
    address: str | None = None
    resume: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    command: str = ""


def _values(shares: float | dict[str, float] | None) -> list[float]:
    if isinstance(shares, dict):
        return list(shares.values())
    return [] if shares is None else [shares]


def check_options(options: CompressOptions) -> None:
    """Refuse option values that cannot work.

    Raises:
        InputError: names the option and its value.
    """
    if options.ratio is not None and options.tolerance is not None:
        raise InputError("--ratio and --tolerance: give only one of them, the other follows from it")
    for value in _values(options.ratio):
        if not 0 < value < 1:
            raise InputError(f"--ratio {value}: must lie between 0 and 1, it is the share to remove")
    for value in _values(options.tolerance):
        if not 0 < value < 1:
            raise InputError(f"--tolerance {value}: must lie between 0 and 1, it is a relative error")
    if options.tolerance is not None and options.sensitivity not in (None, "uniform"):
        raise InputError("--tolerance: is a uniform error; it works only with --sensitivity uniform")
    if options.baseline is not None and (options.tolerance is not None or options.sensitivity is not None):
        raise InputError("--baseline: gives every projection the same --ratio; omit --tolerance and --sensitivity")
    if options.costs is not None and (options.tolerance is not None or options.baseline is not None):
        raise InputError("--objective latency: needs measured losses; omit --tolerance and --baseline")
    if options.serve_on not in (None, "cpu", "gpu"):
        raise InputError(f"--serve-on {options.serve_on}: must be cpu or gpu")
    if options.costs is not None and isinstance(options.ratio, dict):
        raise InputError("--objective latency: takes one --ratio, a share of the GEMM latency of all towers")
    if options.costs is not None and "experts" in options.include:
        raise InputError("--objective latency: MoE experts have no measured latency; omit --include experts")
    if options.costs is not None and options.sensitivity == "uniform":
        raise InputError("--objective latency: needs measured losses, not --sensitivity uniform")
    if options.refine is not None and not 0 <= options.refine < math.inf:
        raise InputError(f"--refine {options.refine}: must be a number of minutes, or 0 for no distillation")
    if options.refine_tokens is not None and options.refine_tokens < 1:
        raise InputError(f"--refine {options.refine_tokens} tokens: must be at least 1 token")
    if options.refine is not None and options.refine_tokens is not None:
        raise InputError("`refine` and `refine_tokens`: give only one of them")
    _check_bits(options)
    _check_target_loss(options)
    _check_target_latency(options)
    if options.num_calibration_samples is not None and options.num_calibration_samples < 1:
        raise InputError(f"--num-calibration-samples {options.num_calibration_samples}: must be at least 1")
    if not 0 < options.head_tolerance < 1:
        raise InputError(f"--head-tolerance {options.head_tolerance}: must lie between 0 and 1, it is a relative error")
    if options.max_seq_length < 8:
        raise InputError(f"--max-seq-length {options.max_seq_length}: must be at least 8")
    if options.memory_budget is not None and options.memory_budget < 1:
        raise InputError(f"--memory-budget {options.memory_budget}: must be positive")
    if options.executor not in (LOCAL, RAY):
        raise InputError(f"--executor {options.executor}: must be {LOCAL} or {RAY}")
    if options.executor == RAY and find_spec("ray") is None:
        raise InputError("--executor ray: Ray is not installed; pip install 'pgsvd-vllm[ray]'")
    if options.address is not None and options.executor != RAY:
        raise InputError(f"--address {options.address}: is of a Ray cluster; add --executor {RAY}")
    if not -(2**63) <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: must fit into 64 bits")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: must be one of auto, {', '.join(DTYPES)}")
    _check_folders(options)


def _check_bits(options: CompressOptions) -> None:
    """Refuse bits and sizes in bytes that nothing can choose."""
    bits, size = options.bits, options.target_bytes
    if bits not in BITS:
        raise InputError(f"--bits {bits}: must be one of {', '.join(BITS)}")
    if BITS[bits] != (None,) and "experts" in options.include:
        raise InputError(f"--bits {bits}: MoE experts are not quantized; omit it or --include experts")
    if size is not None and (options.ratio is not None or options.tolerance is not None):
        raise InputError("--target-bytes: determines how much is removed; omit --ratio and --tolerance")
    if size is not None and size < 1:
        raise InputError(f"--target-bytes {size}: must be positive")
    if size is not None and "lm_head" in options.include:
        raise InputError("--target-bytes: an LM head gets its rank by --head-tolerance; omit --include lm_head")
    targets = (options.ratio, size, options.target_loss, options.target_latency)
    if bits == AUTO and targets == (None, None, None, None):
        raise InputError(
            "--bits auto: needs a size, --target-bytes of all weights or --ratio of the projections' bytes to remove, "
            "or a --target-loss"
        )
    for given, name in ((bits == AUTO, "--bits auto"), (size is not None, "--target-bytes")):
        if given and (options.baseline is not None or options.sensitivity == "uniform"):
            raise InputError(f"{name}: needs measured losses; omit --baseline and --sensitivity uniform")
        if given and options.costs is not None:
            raise InputError(f"{name}: is about size; omit --costs and what goes with it")


def _check_target_loss(options: CompressOptions) -> None:
    """Refuse a predicted loss that nothing can choose by."""
    loss = options.target_loss
    if loss is None:
        return
    if not 0 < loss < math.inf:
        raise InputError(f"--target-loss {loss}: must be a positive number of nats per token")
    if options.ratio is not None or options.tolerance is not None or options.target_bytes is not None:
        raise InputError("--target-loss: determines how much is removed; omit --ratio, --tolerance and --target-bytes")
    if options.baseline is not None or options.sensitivity not in (None, "measured"):
        raise InputError("--target-loss: needs losses in nats; omit --baseline, or give --sensitivity measured")


def _check_target_latency(options: CompressOptions) -> None:
    """Refuse a latency that nothing can choose by."""
    target = options.target_latency
    if target is None:
        return
    if not 0 < target < math.inf:
        raise InputError(f"--target-latency {target}: must be a positive number of milliseconds")
    others = (options.ratio, options.tolerance, options.target_bytes, options.target_loss)
    if others != (None, None, None, None):
        raise InputError("--target-latency: determines how much is removed; omit the other targets")
    if options.bits != "16":
        raise InputError("--target-latency: the latency table has GEMMs of 16 bits; omit --bits")
    if options.costs is None:
        raise InputError("--target-latency: needs the latencies of the serving machine, --costs FILE")


def _check_folders(options: CompressOptions) -> None:
    """Refuse an output folder that exists or lies inside the model, and a calibration folder in its way."""
    output, label = options.output, f"--output-dir {options.output}"
    # A hub id is no folder; the current folder is the one of an empty name.
    model = Path(os.path.realpath(options.model)) if options.model and os.path.isdir(options.model) else None
    target = Path(os.path.realpath(output))
    if os.path.lexists(output) or os.path.lexists(target):
        needed = any(folder.is_relative_to(target) for folder in (Path.cwd(), *([] if model is None else [model])))
        raise InputError(f"{label}: already exists; {'' if needed else 'remove it or '}choose another folder")
    if model is not None and target.is_relative_to(model):
        raise InputError(f"{label}: lies inside MODEL {options.model}; choose a folder outside of it")
    if options.calibration is None:
        return
    folder = Path(os.path.realpath(options.calibration))
    for taken, name in ((target, label), (target.with_name(f"{target.name}.partial"), f"{label}.partial")):
        if folder.is_relative_to(taken):
            raise InputError(f"--calibration {options.calibration}: lies inside {name}; choose another folder")
    if model is not None and folder.is_relative_to(model):
        raise InputError(f"--calibration {options.calibration}: lies inside MODEL {options.model}; choose another")
