"""What a compression will do, worked out before anything is computed or written."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pgsvd_vllm.checkpoint import FLOAT_DTYPES
from pgsvd_vllm.costs import CostTable, read_costs
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.allocate import check_times
from pgsvd_vllm.offline.model_source import ModelSource, Projection, resolve_folder
from pgsvd_vllm.offline.text import (
    BUILTIN,
    Windows,
    cut_windows,
    leading_tokens,
    load_tokenizer,
    mix_windows,
    read_documents,
    tokenize,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_RATIO = 0.2
# Windows of the text that `refine` never trains on, and judges its result by.
HELD_OUT = 8


@dataclass(frozen=True)
class CompressOptions:
    """What the user asked for; the command line's options, field for field.

    Attributes:
        model: local folder or hub id.
        output: folder to write; must not exist.
        ratio: share of the projections' parameters to remove, of their time where `costs` is given, or None.
        tolerance: uniform relative error to allow instead, or None.
        sensitivity: `measured`, `forward` or `uniform`; None is `uniform` with a tolerance or a baseline,
            else `measured`, or `forward` where gradients do not fit in memory.
        baseline: one of `BASELINES`, a rival's method in place of this one; None for none.
        form: `pivot` or `factors`; None is `pivot` where sensitivities are measured.
        sequential: whether the factors are fitted layer after layer (see `sequential`); None is
            yes where sensitivities are measured.
        refine: minutes to train the factors for (see `refine`); None for not at all.
        costs: table of times (see `pgsvd_vllm.costs`) to choose ranks by, instead of by size; None for size.
        calibration: folder that keeps what is measured, for other runs; None for the run's own.
        dtype: `auto` keeps each tensor's own.
        device: `auto` takes a GPU where there is one.
    """

    model: str
    output: Path
    ratio: float | None = None
    tolerance: float | None = None
    sensitivity: str | None = None
    baseline: str | None = None
    form: str | None = None
    sequential: bool | None = None
    refine: float | None = None
    costs: Path | None = None
    dataset: tuple[str, ...] = (BUILTIN,)
    num_calibration_samples: int = 128
    max_seq_length: int = 1024
    seed: int = 0
    ignore: tuple[str, ...] = ()
    calibration: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    resume: bool = False
    trust_remote_code: bool = False
    command: str = ""


@dataclass(frozen=True)
class Plan:
    """A checked request: the model is readable, the text is long enough, the output is free.

    Attributes:
        projections: one list a decoder layer.
        ignored: the projections that --ignore keeps dense.
        windows: the calibration windows.
        costs: what products take on the serving machine, or None.
        compute_dtype: of the calibration forward.
        store_dtype: of the written tensors, or None to keep each tensor's own.
    """

    options: CompressOptions
    source: ModelSource
    projections: list[list[Projection]]
    ignored: list[Projection]
    windows: Windows
    costs: CostTable | None
    device: torch.device
    compute_dtype: torch.dtype
    store_dtype: torch.dtype | None

    @property
    def flat(self) -> list[Projection]:
        """All projections in order."""
        return [p for row in self.projections for p in row]

    @property
    def ignored_parameters(self) -> int:
        """Of the projections that --ignore keeps dense."""
        return sum(p.numel for p in self.ignored)

    @property
    def sensitivity(self) -> str:
        """How much projections matter: `measured` by gradients, `forward` by forward passes, or `uniform`."""
        options = self.options
        if options.sensitivity is None:
            return "measured" if options.tolerance is None and options.baseline is None else "uniform"
        return options.sensitivity

    @property
    def measured(self) -> bool:
        """Whether sensitivities are measured, in either way, rather than taken as equal."""
        return self.sensitivity != "uniform"

    @property
    def form(self) -> str:
        """How low-rank matrices are stored."""
        return self.options.form or ("pivot" if self.measured or self.options.baseline == "pifa" else "factors")

    @property
    def sequential(self) -> bool:
        """Whether every layer's factors are fitted on what the factored layers before it hand it."""
        default = self.measured or self.options.baseline == "pifa"
        return default if self.options.sequential is None else self.options.sequential

    @property
    def unreachable_parameters(self) -> int:
        """Of matrices inside the layers that are no projections, such as stacked experts."""
        known = {f"{p.name}.weight" for p in (*self.flat, *self.ignored)}
        layers = self.source.layers.named_parameters(prefix=self.source.layers_name)
        return sum(parameter.numel() for name, parameter in layers if parameter.dim() > 1 and name not in known)

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model as stored."""
        return sum(info.numel for info in self.source.tensors.values())


def check_options(options: CompressOptions) -> None:
    """Refuse option values that cannot work; raises InputError naming the option."""
    if options.ratio is not None and options.tolerance is not None:
        raise InputError("--ratio and --tolerance: give one of them, each follows from the other")
    if options.ratio is not None and not 0 < options.ratio < 1:
        raise InputError(f"--ratio {options.ratio}: must lie between 0 and 1, it is the share that is removed")
    if options.tolerance is not None and not 0 < options.tolerance < 1:
        raise InputError(f"--tolerance {options.tolerance}: must lie between 0 and 1, it is a relative error")
    if options.tolerance is not None and options.sensitivity not in (None, "uniform"):
        raise InputError("--tolerance: is a uniform error, it goes with --sensitivity uniform")
    if options.baseline is not None and (options.tolerance is not None or options.sensitivity is not None):
        raise InputError("--baseline: a rival's method gives every projection the same --ratio, nothing else")
    if options.costs is not None and (options.tolerance is not None or options.baseline is not None):
        raise InputError("--objective latency: chooses ranks by measured losses; it goes with --ratio alone")
    if options.costs is not None and options.sensitivity == "uniform":
        raise InputError("--objective latency: needs measured losses, not --sensitivity uniform")
    if options.refine is not None and not 0 < options.refine < math.inf:
        raise InputError(f"--refine {options.refine}: must be a number of minutes above 0")
    if options.num_calibration_samples < 1:
        raise InputError(f"--num-calibration-samples {options.num_calibration_samples}: must be at least 1")
    if options.max_seq_length < 8:
        raise InputError(f"--max-seq-length {options.max_seq_length}: must be at least 8")
    if not -(2**63) <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: must fit into 64 bits")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: must be one of auto, {', '.join(DTYPES)}")
    if os.path.lexists(options.output):
        raise InputError(f"--output-dir {options.output}: already exists; remove it or choose another folder")


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one.

    Raises:
        InputError: no such device, or one without float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {name}: cannot be used ({reason})") from None
    return device


def make_plan(options: CompressOptions) -> Plan:
    """Check the request and read everything but the weights.

    Raises:
        InputError: an option, the model, the tokenizer or the text cannot be used.
        CheckpointError: a file of the model is missing or damaged.
    """
    check_options(options)
    device = pick_device(options.device)
    source = ModelSource(resolve_folder(options.model), options.trust_remote_code)
    projections = source.projections(options.ignore)
    flat = [p for row in projections for p in row]
    for p in flat:
        info = source.header(f"{p.name}.weight")
        if info.dtype not in FLOAT_DTYPES and options.dtype == "auto":
            raise InputError(f"{info.file}: {p.name}.weight is stored as {info.dtype}; choose a --dtype to write")
    everything = source.projections() if options.ignore else projections
    factored = {p.name for p in flat}
    ignored = [p for row in everything for p in row if p.name not in factored]

    limit = getattr(source.config, "max_position_embeddings", None) or options.max_seq_length
    length = min(options.max_seq_length, limit)
    windows = _windows(options, source, length)
    widest = max(flat, key=lambda p: p.in_features)
    if windows.ids.numel() < widest.in_features:
        raise InputError(
            f"--dataset {windows.name}: {windows.ids.numel()} tokens are too little calibration text; "
            f"{widest.name} has {widest.in_features} inputs and needs at least as many tokens"
        )

    store_dtype = None if options.dtype == "auto" else DTYPES[options.dtype]
    compute_dtype = store_dtype or source.weight_dtype
    if device.type == "cpu" and not _multiplies_on_cpu(compute_dtype):
        compute_dtype = torch.float32
    costs = None if options.costs is None else _costs(options)
    plan = Plan(options, source, projections, ignored, windows, costs, device, compute_dtype, store_dtype)
    if costs is not None:
        check_times(options.ratio or DEFAULT_RATIO, flat, ignored, plan.form, costs)
    return plan


def _costs(options: CompressOptions) -> CostTable:
    """The table of times, of the dtype that will be served."""
    assert options.costs is not None
    table = read_costs(options.costs)
    wanted = "bfloat16" if options.dtype == "auto" else options.dtype
    if table.dtype != wanted:
        raise InputError(
            f"--costs {options.costs}: times of {table.dtype}; make it with pgsvd-vllm profile --dtype {wanted}, or "
            f"choose --dtype {table.dtype}"
        )
    return table


def _multiplies_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions; emulated, products are 10 times slower than float32."""
    if dtype == torch.bfloat16:
        able = torch.cpu.get_capabilities()
        return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype != torch.float16


def _windows(options: CompressOptions, source: ModelSource, length: int) -> Windows:
    """The calibration windows: an equal share from every data set."""
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    spare = 0 if options.refine is None else HELD_OUT
    parts = []
    for i, dataset in enumerate(options.dataset):
        count = len(range(i, options.num_calibration_samples, len(options.dataset)))
        count, left_over = max(1, count), -(-spare // len(options.dataset))
        tokens = tokenize(tokenizer, read_documents(dataset, (count + left_over) * length, tokenizer))
        parts.append(cut_windows(tokens, leading_tokens(tokenizer), count, length, options.seed, dataset, left_over))
    windows = mix_windows(parts)
    rows = source.vocabulary
    if int(windows.ids.max()) >= rows:
        raise InputError(
            f"{source.folder}: the tokenizer makes id {int(windows.ids.max())}, the model has {rows} embeddings; "
            "the tokenizer belongs to another model"
        )
    return windows
