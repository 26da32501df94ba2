"""The pipeline: plan, calibrate, allocate ranks, factorize, write."""

import errno
from collections.abc import Callable

from safetensors import SafetensorError

from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.calibration.collect import calibrate_layers
from pgsvd_vllm.offline.calibration.token_coverage import leave_uncovered_dense, token_counts
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.factors.lm_head import factor_lm_head
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.checkpoint import CompressResult, write_checkpoint
from pgsvd_vllm.offline.output.messages import _head_line, _time_line, describe, front_line, rank_rule
from pgsvd_vllm.offline.ranks.select import choose_ranks, measured_front
from pgsvd_vllm.offline.refine.run import refine_layers
from pgsvd_vllm.offline.run.plan import make_plan
from pgsvd_vllm.offline.run.resources import check_disk, disk_bytes, fit_into_memory
from pgsvd_vllm.offline.run.state import RunState


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
    workspace = RunState(plan)
    keep = workspace.has_any_layer  # of the run that is resumed
    try:
        check_disk(plan, disk_bytes(plan) - workspace.used_bytes, workspace.folder)
        calibrate_layers(plan, workspace)
        keep = True  # another --ratio or --tolerance may do
        tokens = token_counts(plan, workspace)
        plan = leave_uncovered_dense(plan, workspace, tokens, say)
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
            head = factor_lm_head(plan, plan.head, workspace.load_head())
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
