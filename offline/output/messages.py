"""What a run tells its user, in words."""

import math

from pgsvd_vllm.offline.options import WINDOWS
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.run.plan import Plan


def describe(plan: Plan) -> str:
    """One paragraph: model, text, what is about to happen."""
    ignored = f", {plan.ignored_parameters / 1e6:.1f} M more ignored" if plan.ignored_parameters else ""
    if plan.unreachable_parameters:
        ignored += (
            f"; {plan.unreachable_parameters / 1e6:.1f} M in other matrices of theirs, such as "
            f"{'routers' if plan.source.splits else 'experts'}, stay dense"
        )
        if not plan.source.splits and plan.source.could_split:
            ignored += " (--include experts factors them)"
    if plan.unused:
        towers = " and ".join(sorted({p.tower for p in plan.unused}))
        reason = "layers whose outputs nobody reads" if plan.pairs else "no images in the calibration data"
        ignored += f"; {sum(p.numel for p in plan.unused) / 1e6:.1f} M of the {towers} model stay dense ({reason})"
    starving = _starving_line(plan)
    sizes = {tower: sum(p.numel for p in plan.flat if p.tower == tower) for tower in plan.towers}
    parts = ", ".join(f"{tower} {size / 1e6:.1f} M" for tower, size in sizes.items())
    return (
        f"{plan.options.model}: {plan.total_parameters / 1e6:.1f} M parameters, "
        f"{sum(p.numel for p in plan.flat) / 1e6:.1f} M in {len(plan.flat)} projections of "
        f"{len(plan.projections)} layers{f' ({parts})' if len(sizes) > 1 else ''}{ignored}\n"
        f"calibration: {_data_line(plan)}, "
        f"on {plan.device} in {str(plan.compute_dtype).removeprefix('torch.')}{starving}"
    )


def _starving_line(plan: Plan) -> str:
    """What to do where the average expert will see too few tokens; empty where it sees enough."""
    experts = [p for p in plan.flat if p.reach < 1]
    short = [p for p in experts if plan.tokens * p.reach < p.in_features]
    if not short:
        return ""
    needed = max(p.in_features / p.reach for p in short) / plan.tokens
    samples = len(plan.windows.ids) + (plan.pairs.count if plan.pairs else 0)
    return (
        f"\nWARNING: an expert sees about {plan.tokens * short[0].reach:.0f} tokens, and to be compressed needs as "
        f"many as it has inputs, up to {max(p.in_features for p in short)}; --num-calibration-samples "
        f"{math.ceil(2 * needed * samples)} would do for most"
    )


def _data_line(plan: Plan) -> str:
    """How much of what is read."""
    ids, parts = plan.windows.ids, []
    if plan.pairs is not None:
        parts.append(f"{plan.pairs.count} images with texts from {plan.pairs.name}")
    if len(ids):
        wanted = plan.options.num_calibration_samples or WINDOWS
        short = f" (the text has no more; {wanted} asked for)" if not parts and len(ids) < wanted else ""
        parts.append(f"{len(ids)} windows{short} of {ids.shape[1]} tokens from {plan.windows.name}")
    return " and ".join(parts)


def _time_line(plan: Plan, allocation: Allocation) -> str:
    if plan.costs is None or allocation.time is None:
        return ""
    tokens = f"{plan.costs.tokens} token" + ("s" if plan.costs.tokens > 1 else "")
    return f", {allocation.time:.1%} of their time for {tokens} (measured on {plan.costs.machine})"


def _head_line(plan: Plan, report: ModuleReport) -> str:
    wanted = f"with a relative error of {plan.options.head_tolerance}"
    if report.rank is None:
        return f"output head stays dense: factors {wanted} would be larger; a larger --head-tolerance may help"
    removed = 1 - report.rank * (report.out_features + report.in_features) / (report.out_features * report.in_features)
    return f"output head: rank {report.rank} of {report.in_features} {wanted}, {removed:.1%} of its parameters removed"


def rank_rule(plan: Plan, allocation: Allocation) -> str:
    """What the ranks follow from, in words."""
    if plan.options.baseline is not None:
        return f"one ratio for every projection, method {plan.options.baseline}"
    if not allocation.tolerances:
        if plan.sensitivity == "forward":
            return f"responses of the residual stream ({allocation.loss:.4f} of its energy predicted)"
        return f"measured losses ({allocation.loss:.3f} nats a token predicted)"
    if len(plan.towers) == 1:
        return f"one relative output error for every projection, {next(iter(allocation.tolerances.values())):.4f}"
    each = ", ".join(f"{tower} {tolerance:.4f}" for tower, tolerance in allocation.tolerances.items())
    return f"one relative output error for every projection of a tower, {each}"


def front_line(plan: Plan, front: LossFront) -> str:
    """The loss that other sizes would cost, in words."""
    what = "loss" if plan.sensitivity == "measured" else "relative error of the residual stream"
    share = "removed share of the time" if front.by_time else "removed share"
    return f"predicted {what} by {share}: " + ", ".join(f"{r:.0%} {x:.4f}" for r, x in front.summary(0.1))
