"""The progress lines of a run."""

import math
import re
from collections import Counter

from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.options import HELD_OUT, SELF, WINDOWS
from pgsvd_vllm.offline.planning.dose import dose_of
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.ranks.stored import bits_per_weight
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.settings import FORWARD, MEASURED, RunSettings


def describe(plan: Plan) -> str:
    """The lines that describe a run before it starts: model, projections, calibration data, device and dtype."""
    projections, settings = plan.projections, plan.settings
    sizes = {tower: sum(p.numel for p in projections.flat if p.tower == tower) for tower in projections.towers}
    parts = ", ".join(f"{tower} {size / 1e6:.1f} M" for tower, size in sizes.items())
    return (
        f"{plan.options.model}: {plan.source.weights.numel / 1e6:.1f} M parameters, "
        f"{sum(p.numel for p in projections.flat) / 1e6:.1f} M in {len(projections.flat)} projections of "
        f"{len(projections.layers)} layers{f' ({parts})' if len(sizes) > 1 else ''}{_dense_line(plan)}\n"
        f"calibration: {_data_line(plan.data, plan.options.num_calibration_samples)}, "
        f"on {settings.device} in {str(settings.compute_dtype).removeprefix('torch.')}{_coverage_line(plan)}"
        + "".join(f"\nWARNING: --dataset {warning}" for warning in plan.data.warnings)
        + _form_line(plan)
        + _distillation_line(plan)
        + _quantization_line(plan)
        + _roles_line(plan)
    )


def _form_line(plan: Plan) -> str:
    """The default form of low-rank matrices, where it depends on the machine that will serve the model."""
    options = plan.options
    wide = any(storage.scheme is None or storage.scheme.num_bits == 8 for storage in plan.settings.storages)
    if options.form is not None or options.serve_on != "gpu" or not plan.settings.measured or not wide:
        return ""
    return (
        "\nform: factors, which GPUs run faster than the pivot form; at the same size the pivot form loses less "
        "(`serve_on` cpu, or `form` pivot)"
    )


def _distillation_line(plan: Plan) -> str:
    """How much distillation follows, or that the text is too short for the default."""
    dose, windows = plan.settings.dose, plan.data.windows
    if dose is not None:
        return (
            f"\ndistillation: {dose.tokens} tokens" if dose.minutes is None else f"\ndistillation: {dose.minutes:g} min"
        )
    default = dose_of(plan.options, plan.source, plan.settings.device.type) is not None
    if default and len(windows.others) < HELD_OUT and SELF not in windows.name.split(" + "):
        return f"\nWARNING: no distillation: the text has fewer than {HELD_OUT} windows beside the calibration windows"
    return ""


def _quantization_line(plan: Plan) -> str:
    """The quantizations that the plan allows, and the size that it must reach."""
    names = ["none" if storage.scheme is None else storage.scheme.name for storage in plan.settings.storages]
    line = f"\nquantization: {', '.join(names)}" if plan.settings.quantizes else ""
    line += ", one for all projections of an input" if plan.settings.chooses_bits else ""
    if plan.target.itemsizes is not None and isinstance(plan.target.ratio, float):
        dense = bits_per_weight(plan.projections.every, {}, plan.itemsizes)
        line += f"\nsize: {dense * (1 - plan.target.ratio):.2f} bits per weight of the projections"
    return line


def quantization_text(allocation: Allocation) -> str:
    """The schemes of the quantized matrices."""
    return ", ".join(scheme.name for scheme in allocation.schemes) or "none"


def _bits_line(plan: Plan, allocation: Allocation) -> str:
    """The bits per weight where projections are quantized or the size is given in bytes, and how many have which."""
    if not allocation.schemes and plan.target.itemsizes is None:
        return ""
    bits = bits_per_weight(plan.projections.every, allocation.modules, plan.itemsizes)
    line = f"; {bits:.2f} bits per weight"
    if plan.settings.chooses_bits:
        used = Counter(_scheme_name(allocation.modules.get(p.name)) for p in plan.projections.flat)
        line += f" ({', '.join(f'{count} {name}' for name, count in used.most_common())})"
    return line


def _scheme_name(module: FactoredModule | None) -> str:
    """The scheme of a module's first quantized matrix."""
    return next((scheme.name for scheme in module.schemes.values()), "plain") if module is not None else "plain"


def _roles_line(plan: Plan) -> str:
    """The linear layers that are no projections, with their siblings in other layers, and what they are instead."""
    roles: dict[str, set[str]] = {}
    for path, role in plan.others.items():
        roles.setdefault(role, set()).add(re.sub(r"[.][0-9]+(?=[.])", ".*", path))
    parts = [f"{', '.join(sorted(paths))} ({role})" for role, paths in roles.items()]
    return f"\nno projections, stay dense: {'; '.join(parts)}" if parts else ""


def _dense_line(plan: Plan) -> str:
    """The parameters that stay dense before any rank is chosen, and the reason."""
    projections, source = plan.projections, plan.source
    line = f", {projections.ignored_numel / 1e6:.1f} M more ignored" if projections.ignored else ""
    known = {f"{p.path}.weight" for p in (*projections.flat, *projections.ignored, *projections.unused)}
    others = source.other_numel(known)
    if others:
        kind = "routers" if source.unstacks_experts else "MoE experts"
        line += f"; {others / 1e6:.1f} M in other matrices of the layers, such as {kind}, stay dense"
        if not source.unstacks_experts and source.could_unstack:
            line += " (`include` experts factors MoE experts)"
    if projections.unused:
        towers = " and ".join(sorted({p.tower for p in projections.unused}))
        reason = "the model ignores their layers' outputs" if plan.data.pairs else "no images in the calibration data"
        line += f"; {sum(p.numel for p in projections.unused) / 1e6:.1f} M of the {towers} model stay dense ({reason})"
    return line + _unused_line(plan)


def _unused_line(plan: Plan) -> str:
    """The stored tensors that the model of transformers does not have, which stay as they are."""
    weights = plan.source.weights
    names = weights.unused
    if not names:
        return ""
    size = sum(weights.tensors[name].numel for name in names)
    return (
        f"; {len(names)} tensors of {size / 1e6:.1f} M parameters are not part of {type(plan.source.model).__name__} "
        f"in transformers and stay dense, such as {names[0]}"
    )


def _coverage_line(plan: Plan) -> str:
    """A warning if the average MoE expert will see fewer tokens than it has inputs; else empty."""
    tokens = plan.data.tokens
    short = [p for p in plan.projections.flat if p.reach < 1 and tokens * p.reach < p.in_features]
    if not short:
        return ""
    needed = max(p.in_features / p.reach for p in short) / tokens
    return (
        f"\nWARNING: an MoE expert sees about {tokens * short[0].reach:.0f} tokens; it is compressed only if it sees "
        f"as many as it has inputs, up to {max(p.in_features for p in short)}; `num_calibration_samples` "
        f"{math.ceil(2 * needed * plan.data.samples)} suffices for most"
    )


def _data_line(data: CalibrationSet, requested: int | None) -> str:
    """The amount of calibration data and the names of its data sets."""
    ids, parts = data.windows.ids, []
    if data.pairs is not None:
        written = ""
        if data.to_sample is not None and SELF not in data.windows.name.split(" + "):
            written = f" (by the model itself in about {duration(data.to_sample.seconds)})"
        parts.append(f"{data.pairs.count} images with texts{written} from {data.pairs.name}")
    if len(ids):
        count = requested or WINDOWS
        short = f" (the text has no more; {count} would be used)" if not parts and len(ids) < count else ""
        parts.append(f"{len(ids)} windows{short} of {ids.shape[1]} tokens from {_text_name(data)}")
    return " and ".join(parts)


def _text_name(data: CalibrationSet) -> str:
    """The names of the texts; says what `self` is and how long it takes."""
    own = "the model itself (self)"
    if data.to_sample is not None:
        own = f"the model itself (self, sampled in about {duration(data.to_sample.seconds)})"
    return " + ".join(own if name == SELF else name for name in data.windows.name.split(" + "))


def duration(seconds: float) -> str:
    """A duration in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ranks_line(plan: Plan, allocation: Allocation) -> str:
    """The number of factored projections, the rule of their ranks, and the removed shares."""
    latency = ""
    if plan.latencies is not None and allocation.latency_removed is not None:
        tokens = f"{plan.latencies.tokens} token" + ("s" if plan.latencies.tokens > 1 else "")
        latency = f", {allocation.latency_removed:.1%} of their latency for {tokens} ({plan.latencies.machine})"
    return (
        f"ranks by {rank_rule(plan.settings, allocation)}: {len(allocation.ranks)} of {len(plan.projections.flat)} "
        f"projections factored, {allocation.removed:.1%} of their parameters removed{latency}"
        + _bits_line(plan, allocation)
    )


def lm_head_line(settings: RunSettings, report: ModuleReport) -> str:
    """The rank of the LM head, or why it stays dense."""
    condition = f"with a relative error of {settings.head_tolerance}"
    if report.rank is None:
        return f"LM head stays dense: factors {condition} would be larger; a larger `head_tolerance` may help"
    removed = 1 - report.rank * (report.out_features + report.in_features) / (report.out_features * report.in_features)
    return f"LM head: rank {report.rank} of {report.in_features} {condition}, {removed:.1%} of its parameters removed"


def rank_rule(settings: RunSettings, allocation: Allocation) -> str:
    """The rule that determines the ranks."""
    if settings.baseline is not None:
        return f"one ratio for every projection, method {settings.baseline}"
    if not allocation.tolerances:
        if settings.sensitivity == FORWARD:
            return f"noise responses of the residual stream (a change by {allocation.loss:.4f} of its energy predicted)"
        return f"measured losses ({allocation.loss:.3f} nats per token predicted)"
    if len(allocation.tolerances) == 1:
        return f"one relative output error for every projection, {next(iter(allocation.tolerances.values())):.4f}"
    each = ", ".join(f"{tower} {tolerance:.4f}" for tower, tolerance in allocation.tolerances.items())
    return f"one relative output error for every projection of a tower, {each}"


def front_line(settings: RunSettings, front: LossFront) -> str:
    """The predicted loss at every tenth of the removed share."""
    quantity = "loss" if settings.sensitivity == MEASURED else "relative error of the residual stream"
    share = "removed share" if front.unit == "parameters" else f"removed share of the {front.unit}"
    return f"predicted {quantity} by {share}: " + ", ".join(f"{r:.0%} {x:.4f}" for r, x in front.summary(0.1))
