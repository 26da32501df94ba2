"""The pipeline of a run: plan, calibrate, choose ranks, factorize, distill, write."""

import errno
from collections.abc import Callable

from safetensors import SafetensorError

from pgsvd_vllm.errors import ChoiceError, InputError, PgsvdError
from pgsvd_vllm.offline.calibration.collect import Calibration, loss_energies, output_energies
from pgsvd_vllm.offline.calibration.token_coverage import check_towers_left, leave_uncovered_dense, token_counts
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.factors.lm_head import factor_lm_head
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.messages import describe, front_line, lm_head_line, ranks_line
from pgsvd_vllm.offline.output.outcome import Choice, CompressResult
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.prepare import open_state, prepare
from pgsvd_vllm.offline.planning.resources import check_disk, disk_bytes
from pgsvd_vllm.offline.ranks.select import Spectra, choose_ranks, measured_front
from pgsvd_vllm.offline.refine.run import refine_layers
from pgsvd_vllm.offline.run_state import RunState

Say = Callable[[str], None]


def compress(options: CompressOptions, say: Say = lambda _line: None) -> CompressResult:
    """Compress a model and write it to `options.output`.

    Args:
        options: the request.
        say: called with one progress line at every stage.

    Returns:
        What was written.

    Raises:
        InputError: an option, the model or the calibration data cannot be used, or the disk is full.
        CheckpointError: a file of the model is missing or damaged.
    """
    plan = prepare(options, say)
    say(describe(plan))
    state = open_state(plan)
    keep = state.has_any_layer  # a resumed run keeps its finished layers
    try:
        check_disk(plan, disk_bytes(plan) - state.used_bytes, state.folder)
        calibrate(plan, state)
        keep = True
        result = _factor_and_write(plan, state, say)
        state.publish()
        return result
    except PgsvdError as error:
        if isinstance(error, ChoiceError):
            raise ChoiceError(f"{error} (calibration is kept: repeat with --resume)") from None
        if keep:
            raise type(error)(
                f"{error} (measurements are kept in {state.folder}; they fit the same options alone)"
            ) from None
        state.discard()
        raise
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise InputError(
            f"--output-dir {options.output}: the disk is full; finished layers are kept in {state.folder}: "
            "make room and repeat with --resume"
        ) from None
    except KeyboardInterrupt:
        if state.has_any_layer:
            raise KeyboardInterrupt(f"finished layers are kept in {state.folder}, continue with --resume") from None
        state.discard()
        raise


def calibrate(plan: Plan, state: RunState) -> None:
    """Calibrate every layer that the state does not hold yet; raises InputError as `Calibration.run`."""
    Calibration(plan.source, plan.data, plan.settings, plan.projections, state).run()


def measured_spectra(plan: Plan, state: RunState) -> Spectra:
    """The spectra of every projection of a calibrated run; raises InputError if a file of the state is damaged."""
    layers, sensitivity = len(plan.projections.layers), plan.settings.sensitivity
    losses = loss_energies(state, layers, sensitivity) if plan.settings.measured else None
    return Spectra(output_energies(state, layers), losses)


def _factor_and_write(plan: Plan, state: RunState, say: Say) -> CompressResult:
    """Choose ranks, factor and write the checkpoint of a calibrated run into the state's folder."""
    plan, tokens = _without_uncovered(plan, state, say)
    spectra = measured_spectra(plan, state)
    front = None if spectra.loss is None else measured_front(plan.projections, spectra.loss, plan.target)
    if front is not None:
        say(front_line(plan.settings, front))
    allocation = choose_ranks(plan.projections, spectra, plan.target, front)
    say(ranks_line(plan, allocation))
    factor_layers(plan.source, plan.data, plan.settings, plan.projections, state, allocation.ranks)
    if plan.settings.refine_minutes is not None:
        refine_layers(plan.source, plan.data, plan.settings, plan.projections, state, say)
    head = None
    if plan.projections.lm_head is not None:
        head = factor_lm_head(plan.source, plan.settings, plan.projections.lm_head, state.load_lm_head())
        say(lm_head_line(plan.settings, head.report))
    return write_checkpoint(plan, state, Choice(allocation, front, tokens, head))


def _without_uncovered(plan: Plan, state: RunState, say: Say) -> tuple[Plan, dict[str, int]]:
    """The plan without projections that too few tokens reach, and the tokens of each MoE expert and projector."""
    tokens = token_counts(plan.projections, state)
    left = leave_uncovered_dense(plan.projections, plan.settings, state, tokens, say)
    for option, shares in (("ratio", plan.options.ratio), ("tolerance", plan.options.tolerance)):
        check_towers_left(left, shares if isinstance(shares, dict) else (), option, tokens)
    return plan.with_projections(left), tokens
