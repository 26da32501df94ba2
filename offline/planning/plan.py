"""The plan of a run: the checked options, the model and the calibration set, before anything is computed or written."""

from dataclasses import dataclass, replace

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.latency_table import LatencyTable, read_latencies
from pgsvd_vllm.format.schema import FLOAT_DTYPES
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet, DataReader, with_data_defaults
from pgsvd_vllm.offline.data.reached_layers import reached_layers, reached_projections
from pgsvd_vllm.offline.data.sampled.self_text import Machine
from pgsvd_vllm.offline.model.companions import find_companions
from pgsvd_vllm.offline.model.device import gemm_dtype, pick_device
from pgsvd_vllm.offline.model.find_projections import find_lm_head, find_projections
from pgsvd_vllm.offline.model.free_memory import free_memory, least
from pgsvd_vllm.offline.model.hub import resolve_folder
from pgsvd_vllm.offline.model.projection import ProjectionSet, widest
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import LANGUAGE
from pgsvd_vllm.offline.options import AUTO, DEFAULT_RATIO, CompressOptions, check_options
from pgsvd_vllm.offline.planning.dose import dose_of, dose_on
from pgsvd_vllm.offline.planning.weight_bytes import byte_limit, itemsizes_of
from pgsvd_vllm.offline.ranks.target import Limit, RankTarget
from pgsvd_vllm.offline.settings import MEASURED, RunSettings, resolve_settings, store_dtype


@dataclass(frozen=True)
class Plan:
    """A checked request: the model can be read, the calibration set is large enough, the output does not exist.

    Attributes:
        options: the request.
        source: the model.
        projections: to factor, ignored and unused.
        data: the calibration set.
        settings: resolved from the options.
        latencies: GEMM latencies of the serving machine; None if ranks minimise size.
        others: module path of a linear layer -> what it is instead of a projection.
        itemsizes: projection -> bytes of an element of its matrices that are not quantized.
        limit: on the bytes of the weights or the GEMM time of the projections; None without one.
        short_of_memory: whether distillation was left out because it does not fit.
    """

    options: CompressOptions
    source: ModelSource
    projections: ProjectionSet
    data: CalibrationSet
    settings: RunSettings
    latencies: LatencyTable | None
    others: dict[str, str]
    itemsizes: dict[str, int]
    limit: Limit | None = None
    short_of_memory: bool = False

    @property
    def target(self) -> RankTarget:
        """The target that the ranks must reach."""
        options = self.options
        others = (options.ratio, options.tolerance, options.target_loss)
        ratio = DEFAULT_RATIO if others == (None, None, None) else options.ratio
        by_bytes = options.target_bytes is not None or options.bits == AUTO
        return RankTarget(
            ratio if self.limit is None else self.limit.share,
            options.tolerance,
            self.settings.storages,
            options.baseline is not None,
            self.latencies,
            self.itemsizes if by_bytes else None,
            self.limit,
            options.target_loss,
        )

    def with_projections(self, projections: ProjectionSet) -> "Plan":
        """The same plan with other projections."""
        return replace(self, projections=projections)

    def with_text(self) -> "Plan":
        """The same plan with its text sampled from the model, where the plan has only stand-ins for it.

        Raises:
            InputError: the text cannot be sampled.
        """
        if self.data.to_sample is None:
            return self
        machine = _machine(self.options, self.settings.device, self.settings.compute_dtype)
        data = DataReader(self.options, self.source, machine, self.settings.dose).read(sample=True)
        _check_ids(self.source, data)
        return replace(self, data=replace(data, tokens_per_pixel=self.data.tokens_per_pixel))

    def with_sensitivity(self, sensitivity: str) -> "Plan":
        """The same plan with another sensitivity, `measured`, `forward` or `uniform`."""
        return replace(self, settings=replace(self.settings, sensitivity=sensitivity))

    def without_distillation(self) -> "Plan":
        """The same plan without the distillation that does not fit into memory, nor the sampled text for it."""
        plan = replace(self, settings=replace(self.settings, dose=None), short_of_memory=True)
        if self.data.to_sample is None:
            return plan
        machine = _machine(self.options, self.settings.device, self.settings.compute_dtype)
        data = DataReader(self.options, self.source, machine, None).read(sample=False)
        return replace(plan, data=replace(data, tokens_per_pixel=self.data.tokens_per_pixel))


def _machine(options: CompressOptions, device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine that samples text, with the memory that is free now and within the budget."""
    return Machine(device, dtype, least(free_memory(device), options.memory_budget))


def make_plan(options: CompressOptions) -> Plan:
    """Check the request and read everything except the layers' weights.

    A short batch runs, to find what the linear layers do and which layers the calibration set reaches.

    Raises:
        InputError: an option, the model, the tokenizer or the calibration data cannot be used.
        CheckpointError: a file of the model is missing or damaged.
    """
    check_options(options)
    if options.target_loss is not None:
        options = replace(options, sensitivity=MEASURED)  # no other is in nats
    device = pick_device(options.device)
    folder = resolve_folder(options.model, options.trust_remote_code, options.revision)
    source = ModelSource(folder, options.trust_remote_code, "experts" in options.include)
    find_companions(folder, options.trust_remote_code)  # refuses those that cannot be copied in the end
    dose = dose_of(options, source, device.type)
    compute_dtype = gemm_dtype(device, store_dtype(options) or source.weight_dtype)
    machine = _machine(options, device, compute_dtype)
    options = with_data_defaults(options, source, machine)
    latencies = None if options.costs is None else _latencies(options)
    if options.serve_on is None:
        kind = ("cpu" if device.type == "cpu" else "gpu") if latencies is None else latencies.device
        options = replace(options, serve_on=kind)
    data = DataReader(options, source, machine, dose).read(sample=False)
    _check_ids(source, data)
    reach = reached_layers(source, data, device, compute_dtype)
    projections = reached_projections(_projections(options, source, reach.others), reach)
    dtype = store_dtype(options)
    itemsizes = itemsizes_of(source, projections, dtype)
    limit = None
    if options.target_bytes is not None:
        limit = byte_limit(source, projections, itemsizes, dtype, options.target_bytes)
    if options.target_latency is not None and latencies is not None:
        limit = _time_limit(latencies, projections, options.target_latency)
    plan = Plan(
        options,
        source,
        projections,
        replace(data, tokens_per_pixel=reach.tokens_per_pixel),
        resolve_settings(options, device, compute_dtype, dose_on(dose, data.windows)),
        latencies,
        reach.others,
        itemsizes,
        limit,
    )
    _check_data(plan)
    _check_towers(plan)
    return plan


def _projections(options: CompressOptions, source: ModelSource, others: dict[str, str]) -> ProjectionSet:
    """The projections that the options select.

    Args:
        options: of the run.
        source: the model.
        others: module paths of linear layers that are no projections.

    Raises:
        InputError: as of `find_projections`, or a stored dtype cannot be kept.
    """
    found = find_projections(source, options.ignore, others)
    for p in found.flat:
        info = source.weights.header(f"{p.path}.weight")
        if info.dtype not in FLOAT_DTYPES and options.dtype == "auto":
            raise InputError(f"{info.file}: {p.name}.weight is stored as {info.dtype}; choose a --dtype to write")
    return replace(found, lm_head=find_lm_head(source)) if "lm_head" in options.include else found


def _latencies(options: CompressOptions) -> LatencyTable:
    """The latency table; raises InputError if its dtype differs from the dtype to serve."""
    assert options.costs is not None
    table = read_latencies(options.costs)
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    if table.dtype != dtype:
        raise InputError(
            f"--costs {options.costs}: latencies of {table.dtype}; make it with pgsvd-vllm profile --dtype {dtype}, or "
            f"choose --dtype {table.dtype}"
        )
    return table


def _time_limit(latencies: LatencyTable, projections: ProjectionSet, target: float) -> Limit:
    """The limit on the GEMM time of all projections.

    Args:
        latencies: of the serving machine.
        projections: of the run; ignored ones count as projections.
        target: largest GEMM time of all projections, in milliseconds.

    Raises:
        InputError: the dense projections take no longer, or the table lacks a shape.
    """
    dense = sum(latencies.latency(p.out_features, p.in_features, "factors", None) for p in projections.every) / 1000
    if target >= dense:
        raise InputError(
            f"--target-latency {target:g}: all projections take {dense:.3g} ms when dense (tokens: "
            f"{latencies.tokens}); give less"
        )
    return Limit("target_latency", target, dense, dense, "ms")


def _check_data(plan: Plan) -> None:
    """Refuse too little calibration data; raises InputError."""
    projections, data = plan.projections, plan.data
    if not projections.flat:
        raise InputError(
            f"--ignore: nothing is left to compress in {plan.options.model} with this calibration data; its vision "
            "model needs images with texts (--dataset FOLDER)"
        )
    language = widest([p for p in projections.flat if p.tower == LANGUAGE])
    if language is not None and data.tokens < language.in_features:
        raise InputError(
            f"--dataset {data.name}: {data.tokens} tokens are too little calibration text; "
            f"{language.name} has {language.in_features} inputs and needs at least as many tokens"
        )


def _check_ids(source: ModelSource, data: CalibrationSet) -> None:
    """Refuse token ids that the model lacks; raises InputError."""
    ids = {int(token) for batch in data.batches() for token in batch["input_ids"].unique()}
    largest, rows = max(ids - source.placeholders), source.vocabulary
    if largest >= rows:
        raise InputError(
            f"{source.folder}: the tokenizer returns id {largest}, the model has {rows} embeddings; "
            "the tokenizer belongs to another model"
        )


def _check_towers(plan: Plan) -> None:
    """Refuse a ratio or tolerance for a tower that the plan does not compress; raises InputError."""
    towers = plan.projections.towers
    for option, shares in (("--ratio", plan.options.ratio), ("--tolerance", plan.options.tolerance)):
        for tower in shares if isinstance(shares, dict) else ():
            if tower not in towers:
                raise InputError(
                    f"{option} {tower}=...: no such tower is compressed here; there are {', '.join(towers)}"
                )
