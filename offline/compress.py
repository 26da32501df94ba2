"""The pipeline: plan, calibrate, allocate ranks, factorize, write."""

import errno
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from pgsvd_vllm.checkpoint import ShardWriter, open_checkpoint
from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.allocate import Allocation, LossFront
from pgsvd_vllm.offline.calibrate_pass import calibrate_layers, measured_front
from pgsvd_vllm.offline.choose import choose_ranks
from pgsvd_vllm.offline.estimate import check_disk, disk_bytes, fit_into_memory
from pgsvd_vllm.offline.factor_pass import factor_layers
from pgsvd_vllm.offline.head import HeadFactors, factor_head
from pgsvd_vllm.offline.options import WINDOWS, CompressOptions
from pgsvd_vllm.offline.plan import Plan, make_plan
from pgsvd_vllm.offline.refine_pass import refine_layers
from pgsvd_vllm.offline.report import ModuleReport, front_line, rank_rule, write_config, write_description
from pgsvd_vllm.offline.scarce import leave_starved, tokens_reached
from pgsvd_vllm.offline.workspace import Workspace

COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


@dataclass(frozen=True)
class CompressResult:
    """What was written.

    Attributes:
        output: the folder.
        allocation: tolerances and ranks.
        modules: one entry a projection, factored or dense.
        parameters_before, parameters_after: of the whole model.
        compares: whether it compares images with texts, and is served to embed them.
    """

    output: Path
    allocation: Allocation
    modules: list[ModuleReport]
    parameters_before: int
    parameters_after: int
    compares: bool


def compress(options: CompressOptions, say: Callable[[str], None] = lambda _line: None) -> CompressResult:
    """Compress a model and write it to `options.output`.

    Args:
        options: the request.
        say: called with one line at every stage.

    Raises:
        InputError: an option, the model or the text cannot be used, or the disk is full.
        CheckpointError: a file of the model is missing or damaged.
    """
    plan = fit_into_memory(make_plan(options), say)
    say(describe(plan))
    workspace = Workspace(plan)
    keep = workspace.has_any_layer  # of the run that is resumed
    try:
        check_disk(plan, disk_bytes(plan) - workspace.used_bytes, workspace.folder)
        calibrate_layers(plan, workspace)
        keep = True  # another --ratio or --tolerance may do
        tokens = tokens_reached(plan, workspace)
        plan = leave_starved(plan, workspace, tokens, say)
        front = measured_front(plan, workspace) if plan.measured else None
        if front is not None:
            say(front_line(plan, front))
        allocation = choose_ranks(plan, workspace, front)
        say(
            f"ranks by {rank_rule(plan, allocation)}: {len(allocation.ranks)} of {len(plan.flat)} projections "
            f"factored, {allocation.removed:.1%} of their parameters removed{_time_line(plan, allocation)}"
        )
        factor_layers(plan, workspace, allocation)
        if plan.options.refine is not None:
            refine_layers(plan, workspace, say)
        head = None
        if plan.head is not None:
            head = factor_head(plan, plan.head, workspace.load_head())
            say(_head_line(plan, head.report))
        result = write_checkpoint(plan, workspace, allocation, front, tokens, head)
        workspace.publish()
        return result
    except PgsvdError as error:
        if keep:
            raise type(error)(f"{error} (calibration is kept: repeat with --resume)") from None
        workspace.discard()
        raise
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise InputError(
            f"--output-dir {options.output}: the disk is full; what is done is kept in {workspace.folder}: "
            "make room and repeat with --resume"
        ) from None
    except KeyboardInterrupt:
        if workspace.has_any_layer:
            raise KeyboardInterrupt(f"finished layers are kept in {workspace.folder}, continue with --resume") from None
        workspace.discard()
        raise


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


def write_checkpoint(
    plan: Plan,
    workspace: Workspace,
    allocation: Allocation,
    front: LossFront | None,
    tokens: dict[str, int] | None = None,
    head: HeadFactors | None = None,
) -> CompressResult:
    """Write the factors and everything else, and describe the result; `tokens` are those of `tokens_reached`."""
    folder = workspace.begin_checkpoint()
    writer = ShardWriter(folder)
    modules: list[ModuleReport] = []
    after = 0
    for index, row in enumerate(plan.projections):
        factors = workspace.load_factors(index)
        for p in row:
            if p.name not in allocation.ranks:
                modules.append(ModuleReport(p.name, p.out_features, p.in_features, None, 0.0, 0.0, 0))
                continue
            for suffix, tensor in factors.tensors[p.name].items():
                writer.add(f"{p.name}.{suffix}", tensor)
                after += tensor.numel()
            modules.append(factors.reports[p.name])
    paths = [p.path for p in plan.flat if p.name in allocation.ranks]
    if head is not None:
        modules.append(head.report)
        if plan.head is not None and head.tensors:
            paths.append(plan.head.path)
        for suffix, tensor in head.tensors.items():
            writer.add(f"{head.name}.{suffix}", tensor)
            after += tensor.numel()
    factored = {stored for path in paths for stored in plan.source.stored_as(f"{path}.weight")}
    for name in plan.source.tensors:
        if name in factored:
            continue
        tensor = plan.source.read(name)
        if plan.store_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(plan.store_dtype)
        writer.add(name, tensor)
        after += tensor.numel()
    writer.close()
    for path in sorted(plan.source.folder.iterdir()):
        if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    small = head.report if head is not None and head.tensors else None
    write_config(folder, plan, allocation, after, writer.count, small)
    write_description(folder, plan, allocation, front, modules, after, tokens or {})
    open_checkpoint(folder)
    return CompressResult(workspace.output, allocation, modules, plan.total_parameters, after, plan.source.compares)
