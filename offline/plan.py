"""What a compression will do, worked out before anything is computed or written."""

import itertools
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
from pgsvd_vllm.offline.pairs import Pairs, has_pairs, load_processor, mix_pairs, read_pairs
from pgsvd_vllm.offline.stream import Batch, LayerStream, text_batches
from pgsvd_vllm.offline.text import (
    BUILTIN,
    Windows,
    cut_windows,
    leading_tokens,
    load_tokenizer,
    mix_windows,
    no_windows,
    read_documents,
    tokenize,
)
from pgsvd_vllm.offline.towers import LANGUAGE

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
        head_tolerance: relative error to allow in the output head's weighed logits.
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
    costs: CostTable | None
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
    compute_dtype = store_dtype or source.weight_dtype
    if device.type == "cpu" and not _multiplies_on_cpu(compute_dtype):
        compute_dtype = torch.float32
    windows, pairs = _data(options, source)
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


def _reached(
    source: ModelSource,
    projections: list[list[Projection]],
    pairs: Pairs | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[list[Projection]], list[Projection], float]:
    """The projections of layers that the data reaches and something is computed from, all others, and how many tokens
    the vision model makes of a pixel value."""
    if not source.sees:
        return projections, [], 0.0
    used = range(source.spans[-1].start, len(source.layers))
    ends: set[int] = set()
    per_pixel = 0.0
    if pairs is not None:
        stream = LayerStream(source, pairs.batches[:1], device, dtype)
        ends = stream.read
        tokens = sum(hidden.shape[:-1].numel() for hidden in stream.flow.hidden)
        per_pixel = tokens / max(1, pairs.batches[0].get("pixel_values", torch.empty(0)).numel())

    def counts(index: int) -> bool:
        return index in used or any(index <= end for end in ends if end in source.span(index))

    rows = [row if counts(index) else [] for index, row in enumerate(projections)]
    return rows, [p for index, row in enumerate(projections) for p in row if not counts(index)], per_pixel


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


def _data(options: CompressOptions, source: ModelSource) -> tuple[Windows, Pairs | None]:
    """The calibration data: an equal share from every data set."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None) or options.max_seq_length
    length = min(options.max_seq_length, limit)
    texts = [dataset for dataset in options.dataset if not has_pairs(dataset)]
    folders = [dataset for dataset in options.dataset if has_pairs(dataset)]
    if folders and not source.sees:
        raise InputError(
            f"--dataset {folders[0]}: no such file, and {options.model} reads no images; give a text file, wikitext2, "
            f"c4 or {BUILTIN} (offline)"
        )
    if texts and source.compares:
        raise InputError(
            f"--dataset {texts[0]}: {options.model} compares images with texts, and needs both; give a folder with "
            "images and captions.jsonl, a row with image and text for each"
        )
    wanted = options.num_calibration_samples or (PAIRS if source.compares else WINDOWS)
    counts = {dataset: len(range(i, wanted, len(options.dataset))) for i, dataset in enumerate(options.dataset)}
    windows = _windows(options, source, length, [(dataset, max(1, counts[dataset])) for dataset in texts])
    if not folders:
        return windows, None
    processor = load_processor(source.folder, options.trust_remote_code)
    longest = source.config.get_text_config().max_position_embeddings if source.compares else None
    parts = [read_pairs(f, max(1, counts[f]), options.seed, processor, longest) for f in folders]
    return windows, mix_pairs(parts)


def _windows(options: CompressOptions, source: ModelSource, length: int, wanted: list[tuple[str, int]]) -> Windows:
    """The calibration windows of some texts, so many of each."""
    if not wanted:
        return no_windows(length)
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    spare = 0 if options.refine is None else HELD_OUT
    parts = []
    for dataset, count in wanted:
        left_over = -(-spare // len(wanted))
        tokens = tokenize(
            tokenizer, read_documents(dataset, (count + left_over) * length, tokenizer, options.chat_template)
        )
        parts.append(cut_windows(tokens, leading_tokens(tokenizer), count, length, options.seed, dataset, left_over))
    return mix_windows(parts)
