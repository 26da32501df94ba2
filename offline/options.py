"""What a compression is asked for, and which requests cannot work."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError

BASELINES = ("svd", "asvd", "svd-llm", "pifa")
BUILTIN = "python-docs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_RATIO = 0.2
HEAD_TOLERANCE = 0.02
# Calibration samples where no number is asked for: windows of text, or descriptions of images; pairs to compare.
WINDOWS, PAIRS = 128, 1024
# Windows of the text that `refine` never trains on, and judges its result by.
HELD_OUT = 8


@dataclass(frozen=True)
class CompressOptions:
    """What the user asked for; the command line's options, field for field.

    Attributes:
        model: local folder or hub id.
        output: folder to write; must not exist.
        ratio: share of the projections' parameters to remove, of their time where `costs` is given, or None; a dict
            has the shares of towers, and those that it does not name stay dense.
        tolerance: uniform relative error to allow instead, of all towers or, in a dict, of each, or None.
        sensitivity: `measured`, `forward` or `uniform`; None is `uniform` with a tolerance or a baseline,
            else `measured`, or `forward` where gradients do not fit in memory.
        baseline: one of `BASELINES`, a rival's method in place of this one; None for none.
        form: `pivot` or `factors`; None is `pivot` where sensitivities are measured.
        sequential: whether the factors are fitted layer after layer (see `sequential`); None is
            yes where sensitivities are measured.
        refine: minutes to train the factors for (see `refine`); None for not at all.
        costs: table of times (see `pgsvd_vllm.costs`) to choose ranks by, instead of by size; None for size.
        include: what is compressed besides the usual: `experts` of mixtures, and `lm_head`, the output head.
        head_tolerance: relative error to allow in the output head's weighted logits.
        num_calibration_samples: windows of text, or pairs of an image and a text; None for the usual number.
        chat_template: whether plain text is put into the turns of conversations.
        calibration: folder that keeps what is measured, for other runs; None for the run's own.
        dtype: `auto` keeps each tensor's own.
        device: `auto` takes a GPU where there is one.
    """

    model: str
    output: Path
    ratio: float | dict[str, float] | None = None
    tolerance: float | dict[str, float] | None = None
    sensitivity: str | None = None
    baseline: str | None = None
    form: str | None = None
    sequential: bool | None = None
    refine: float | None = None
    costs: Path | None = None
    dataset: tuple[str, ...] = (BUILTIN,)
    num_calibration_samples: int | None = None
    max_seq_length: int = 1024
    chat_template: bool = False
    seed: int = 0
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    head_tolerance: float = HEAD_TOLERANCE
    calibration: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    resume: bool = False
    trust_remote_code: bool = False
    command: str = ""


def _values(shares: float | dict[str, float] | None) -> list[float]:
    if isinstance(shares, dict):
        return list(shares.values())
    return [] if shares is None else [shares]


def check_options(options: CompressOptions) -> None:
    """Refuse option values that cannot work; raises InputError naming the option."""
    if options.ratio is not None and options.tolerance is not None:
        raise InputError("--ratio and --tolerance: give one of them, each follows from the other")
    for value in _values(options.ratio):
        if not 0 < value < 1:
            raise InputError(f"--ratio {value}: must lie between 0 and 1, it is the share that is removed")
    for value in _values(options.tolerance):
        if not 0 < value < 1:
            raise InputError(f"--tolerance {value}: must lie between 0 and 1, it is a relative error")
    if options.tolerance is not None and options.sensitivity not in (None, "uniform"):
        raise InputError("--tolerance: is a uniform error, it goes with --sensitivity uniform")
    if options.baseline is not None and (options.tolerance is not None or options.sensitivity is not None):
        raise InputError("--baseline: a rival's method gives every projection the same --ratio, nothing else")
    if options.costs is not None and (options.tolerance is not None or options.baseline is not None):
        raise InputError("--objective latency: chooses ranks by measured losses; it goes with --ratio alone")
    if options.costs is not None and isinstance(options.ratio, dict):
        raise InputError("--objective latency: takes one --ratio, a share of the time of all towers together")
    if options.costs is not None and "experts" in options.include:
        raise InputError("--objective latency: there are no times of experts; leave --include experts out")
    if options.costs is not None and options.sensitivity == "uniform":
        raise InputError("--objective latency: needs measured losses, not --sensitivity uniform")
    if options.refine is not None and not 0 < options.refine < math.inf:
        raise InputError(f"--refine {options.refine}: must be a number of minutes above 0")
    if options.num_calibration_samples is not None and options.num_calibration_samples < 1:
        raise InputError(f"--num-calibration-samples {options.num_calibration_samples}: must be at least 1")
    if not 0 < options.head_tolerance < 1:
        raise InputError(f"--head-tolerance {options.head_tolerance}: must lie between 0 and 1, it is a relative error")
    if options.max_seq_length < 8:
        raise InputError(f"--max-seq-length {options.max_seq_length}: must be at least 8")
    if not -(2**63) <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: must fit into 64 bits")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: must be one of auto, {', '.join(DTYPES)}")
    if os.path.lexists(options.output):
        raise InputError(f"--output-dir {options.output}: already exists; remove it or choose another folder")
