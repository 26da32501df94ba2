"""What a compression will do, worked out before anything is computed or written."""

import itertools
from dataclasses import dataclass

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.latency_table import LatencyTable, read_latencies
from pgsvd_vllm.format.schema import FLOAT_DTYPES
from pgsvd_vllm.offline.data.calibration_set import read_data
from pgsvd_vllm.offline.data.image_text import Pairs
from pgsvd_vllm.offline.data.reached_layers import _reached
from pgsvd_vllm.offline.data.text import Windows
from pgsvd_vllm.offline.model.batch import Batch, text_batches
from pgsvd_vllm.offline.model.device import gemm_dtype, pick_device
from pgsvd_vllm.offline.model.hub import resolve_folder
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import LANGUAGE
from pgsvd_vllm.offline.options import DEFAULT_RATIO, DTYPES, CompressOptions, check_options
from pgsvd_vllm.offline.ranks.pareto import check_times


@dataclass(frozen=True)
class Plan:
    """A checked request: the model is readable, the text is long enough, the output is free.

    Attributes:
        projections: one list a layer.
        ignored: the projections that --ignore keeps dense.
        unused: those of layers that nothing is computed from, or that the calibration data does not reach.
        windows: the calibration windows; none where all data are pairs.
        pairs: images with texts; None where there are none.
        tokens_per_pixel: that the vision model makes of `pixel_values`.
        costs: what products take on the serving machine, or None.
        head: the output head, if it is to be factored.
        compute_dtype: of the calibration forward.
        store_dtype: of the written tensors, or None to keep each tensor's own.
    """

    options: CompressOptions
    source: ModelSource
    projections: list[list[Projection]]
    ignored: list[Projection]
    unused: list[Projection]
    windows: Windows
    pairs: Pairs | None
    tokens_per_pixel: float
    costs: LatencyTable | None
    head: Projection | None
    device: torch.device
    compute_dtype: torch.dtype
    store_dtype: torch.dtype | None

    @property
    def flat(self) -> list[Projection]:
        """All projections in order."""
        return [p for row in self.projections for p in row]

    @property
    def tokens(self) -> int:
        """Of the calibration data: of texts, and what stands for images in them."""
        return self.windows.ids.numel() + (self.pairs.tokens if self.pairs else 0)

    @property
    def length(self) -> int:
        """Tokens of the longest window or text."""
        longest = [batch["input_ids"].shape[1] for batch in (self.pairs.batches if self.pairs else [])]
        return max([*longest, self.windows.ids.shape[1] if len(self.windows.ids) else 0])

    @property
    def data_name(self) -> str:
        """Where the calibration data came from."""
        names = [self.windows.name] if len(self.windows.ids) else []
        return " + ".join([*names, self.pairs.name] if self.pairs else names)

    @property
    def data_sha256(self) -> str:
        """Of the calibration data."""
        return f"{self.windows.sha256} {self.pairs.sha256}" if self.pairs else self.windows.sha256

    def seen(self, batch: Batch) -> int:
        """Tokens that the vision model makes of a batch's images."""
        return round(self.tokens_per_pixel * batch["pixel_values"].numel()) if "pixel_values" in batch else 0

    def tokens_of(self, tower: str) -> int:
        """Tokens of the calibration data that a tower runs."""
        return self.tokens if tower == LANGUAGE else sum(map(self.seen, self.pairs.batches if self.pairs else []))

    @property
    def most_tokens(self) -> int:
        """Of the tower that has most to run."""
        return max(self.tokens_of(tower.name) for tower in self.source.towers)

    def batches(self, tokens: int | None = None) -> list[Batch]:
        """The arguments of the model's calls, pairs and windows in turn; of about `tokens` tokens, or all."""
        ids, pairs = self.windows.ids, self.pairs.batches if self.pairs else []
        if tokens is not None:
            tokens //= 2 if len(ids) and pairs else 1
            ids = ids[: max(1, tokens // ids.shape[1])]
            weights = (max(batch["input_ids"].numel(), self.seen(batch)) for batch in pairs[:-1])
            ends = itertools.accumulate(weights, initial=0)
            pairs = pairs[: sum(before < tokens for before in ends)]
        turns = itertools.zip_longest(pairs, text_batches(ids))
        return [batch for turn in turns for batch in turn if batch is not None]

    @property
    def towers(self) -> list[str]:
        """The names of those with projections."""
        return list(dict.fromkeys(p.tower for p in self.flat))

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
        known = {f"{p.path}.weight" for p in (*self.flat, *self.ignored, *self.unused)}
        layers = zip(self.source.paths, self.source.layers, strict=True)
        named = (pair for path, layer in layers for pair in layer.named_parameters(prefix=path))
        return sum(parameter.numel() for name, parameter in named if parameter.dim() > 1 and name not in known)

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model as stored."""
        return sum(info.numel for info in self.source.tensors.values())


def make_plan(options: CompressOptions) -> Plan:
    """Check the request and read everything but the weights.

    Raises:
        InputError: an option, the model, the tokenizer or the text cannot be used.
        CheckpointError: a file of the model is missing or damaged.
    """
    check_options(options)
    device = pick_device(options.device)
    source = ModelSource(resolve_folder(options.model), options.trust_remote_code, "experts" in options.include)
    if source.sees and options.refine is not None:
        raise InputError(f"--refine: trains on text alone, and {options.model} reads images; leave it out")
    if source.splits and options.refine is not None:
        raise InputError("--refine: does not train experts; leave it or --include experts out")
    projections = source.projections(options.ignore)
    flat = [p for row in projections for p in row]
    for p in flat:
        info = source.header(f"{p.path}.weight")
        if info.dtype not in FLOAT_DTYPES and options.dtype == "auto":
            raise InputError(f"{info.file}: {p.name}.weight is stored as {info.dtype}; choose a --dtype to write")
    everything = source.projections() if options.ignore else projections
    factored = {p.name for p in flat}
    ignored = [p for row in everything for p in row if p.name not in factored]

    store_dtype = None if options.dtype == "auto" else DTYPES[options.dtype]
    compute_dtype = gemm_dtype(device, store_dtype or source.weight_dtype)
    windows, pairs = read_data(options, source)
    projections, unused, tokens_per_pixel = _reached(source, projections, pairs, device, compute_dtype)
    if not any(projections):
        raise InputError(
            f"--ignore: of {options.model} nothing is left to compress with this calibration data; its vision model "
            "needs images with texts (--dataset FOLDER)"
        )
    costs = None if options.costs is None else _costs(options)
    plan = Plan(
        options,
        source,
        projections,
        ignored,
        unused,
        windows,
        pairs,
        tokens_per_pixel,
        costs,
        source.head() if "lm_head" in options.include else None,
        device,
        compute_dtype,
        store_dtype,
    )
    _check_data(plan)
    for option, shares in (("--ratio", options.ratio), ("--tolerance", options.tolerance)):
        for tower in shares if isinstance(shares, dict) else ():
            if tower not in plan.towers:
                raise InputError(
                    f"{option} {tower}=...: nothing of that name is compressed here, but {', '.join(plan.towers)}"
                )
    if costs is not None:
        assert not isinstance(options.ratio, dict)
        check_times(options.ratio or DEFAULT_RATIO, plan.flat, ignored, plan.form, costs)
    return plan


def _costs(options: CompressOptions) -> LatencyTable:
    """The table of times, of the dtype that will be served."""
    assert options.costs is not None
    table = read_latencies(options.costs)
    wanted = "bfloat16" if options.dtype == "auto" else options.dtype
    if table.dtype != wanted:
        raise InputError(
            f"--costs {options.costs}: times of {table.dtype}; make it with pgsvd-vllm profile --dtype {wanted}, or "
            f"choose --dtype {table.dtype}"
        )
    return table


def _check_data(plan: Plan) -> None:
    """Refuse too little calibration data, and ids that the model does not have; raises InputError."""
    language = [p for p in plan.flat if p.tower == LANGUAGE]
    widest = max(language, key=lambda p: p.in_features, default=None)
    if widest is not None and plan.tokens < widest.in_features:
        raise InputError(
            f"--dataset {plan.data_name}: {plan.tokens} tokens are too little calibration text; "
            f"{widest.name} has {widest.in_features} inputs and needs at least as many tokens"
        )
    ids = {int(token) for batch in plan.batches() for token in batch["input_ids"].unique()}
    largest, rows = max(ids - plan.source.placeholders), plan.source.vocabulary
    if largest >= rows:
        raise InputError(
            f"{plan.source.folder}: the tokenizer makes id {largest}, the model has {rows} embeddings; "
            "the tokenizer belongs to another model"
        )
