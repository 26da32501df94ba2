"""The pipeline of a run: plan, calibrate, choose ranks, factorize, distill, quantize, write."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from pgsvd_vllm.errors import ChoiceError, InputError, PgsvdError, as_interruption, lacks_memory, refusal_of
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.calibration.collect import Calibration, loss_energies, output_energies
from pgsvd_vllm.offline.calibration.token_coverage import find_coverage
from pgsvd_vllm.offline.data.sampled.generate import SampleError
from pgsvd_vllm.offline.executor.executor import Executor, LocalExecutor
from pgsvd_vllm.offline.executor.open import opened
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.factors.lm_head import factor_lm_head
from pgsvd_vllm.offline.model.free_memory import give_back
from pgsvd_vllm.offline.options import BUILTIN, LOCAL, CompressOptions
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.messages import describe, front_line, lm_head_line, ranks_line
from pgsvd_vllm.offline.output.outcome import Choice, CompressResult
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.prepare import open_state, prepare
from pgsvd_vllm.offline.planning.resources import check_disk, disk_bytes
from pgsvd_vllm.offline.ranks.select import Spectra, choose_ranks, measured_front
from pgsvd_vllm.offline.refine.run import Distillation, doses
from pgsvd_vllm.offline.rounding.predicted_loss import measure_rounding, rounding_losses
from pgsvd_vllm.offline.rounding.run import round_layers
from pgsvd_vllm.offline.run_state import RunState, refuse_begun
from pgsvd_vllm.offline.state.published import finish_published
from pgsvd_vllm.offline.state.work_files import WorkFileError

Say = Callable[[str], None]


def compress(
    options: CompressOptions,
    say: Say = lambda _line: None,
    look: Callable[[Plan], None] = lambda _plan: None,
    describe_in: Callable[[Path], None] = lambda _folder: None,
) -> CompressResult:
    """Compress a model and write it to `options.output`.

    Args:
        options: the request.
        say: called with one progress line at every stage.
        look: called with the plan before anything is computed.
        describe_in: called with the folder of the finished checkpoint before it appears as DIR, to add descriptions.

    Returns:
        What was written.

    Raises:
        InputError: an option, the model or the calibration data cannot be used, or the disk is full.
        CheckpointError: a file of the model is missing or damaged.
    """
    if finish(options) or (options.resume and os.path.lexists(options.output)):
        raise InputError(
            f"--output-dir {options.output}: already exists, nothing is left to resume; check it with: "
            f"pgsvd-vllm verify {options.output}"
        )
    plan = prepare(options, say)
    say(describe(plan))
    look(plan)
    if not options.resume:
        refuse_begun(options.output)
    plan = with_text(plan, options, say)
    state = open_state(plan, say)
    keep = state.has_any_layer  # a resumed run keeps its finished layers
    try:
        with as_interruption():
            check_disk(plan, disk_bytes(plan) - state.used_bytes, state.folder)
            plan.source.weights.check_values(plan.settings.store_dtype or plan.source.weight_dtype)
            settings = plan.settings
            with opened(options, plan.source, settings.device, settings.compute_dtype, say) as executor:
                calibrate(plan, state, executor)
                keep = True
                result = _factor_and_write(plan, state, say, executor)
            describe_in(state.checkpoint)
            state.publish(_request(options))
            return result
    except PgsvdError as error:
        if isinstance(error, ChoiceError):
            raise ChoiceError(f"{error} (calibration is kept: repeat with --resume)") from None
        if keep or isinstance(error, WorkFileError):
            raise type(error)(
                f"{error} (measurements are kept in {state.folder}; they fit the same options alone)"
            ) from None
        state.discard()
        raise
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        reason = _failure(error, options)
        if reason is None:
            raise
        raise InputError(f"{reason}{_kept(state)}") from None
    except KeyboardInterrupt:
        if state.is_published:
            state.discard()
            raise KeyboardInterrupt(f"{options.output} is complete") from None
        raise KeyboardInterrupt(_kept(state).removeprefix("; ")) from None
    finally:
        state.close()


def with_text(plan: Plan, options: CompressOptions, say: Say) -> Plan:
    """The plan with its text sampled; where the default cannot be sampled, with Python's documentation instead."""
    try:
        with as_interruption():
            return plan.with_text()
    except SampleError as error:
        if options.dataset is not None:
            raise
        say(f"WARNING: {error}; {BUILTIN} takes its place")
        return prepare(replace(options, dataset=(BUILTIN,)), say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("text that is sampled already is kept, repeat the command") from None


def finish(options: CompressOptions) -> bool:
    """Clean up after a run with these options that was interrupted after it had written DIR; needs `options.resume`.

    Returns:
        Whether DIR is complete, so that nothing is left to resume.

    Raises:
        InputError: another process writes into DIR.partial.
    """
    return options.resume and finish_published(options.output, _request(options))


def _request(options: CompressOptions) -> str:
    """SHA-256 of the options that the result depends on; those at their defaults leave no trace, so that new ones may
    come.
    """
    plain = CompressOptions("", Path())
    same = replace(options, output=Path(), resume=False, memory_budget=None, executor=LOCAL, address=None, command="")
    given = vars(same)
    chosen = {name: value for name, value in given.items() if value != getattr(plain, name)}
    return hashlib.sha256(repr(chosen).encode()).hexdigest()


def _failure(error: Exception, options: CompressOptions) -> str | None:
    """What the system refused, for the user; None for another error."""
    if lacks_memory(error):
        return f"{options.model}: not enough memory is free"
    return refusal_of(error, f"--output-dir {options.output}")


def _kept(state: RunState) -> str:
    """How to continue a run that has stopped; deletes a state without finished layers."""
    if not state.has_any_layer:
        state.discard()
        return "; nothing has been written, repeat the command"
    return f"; finished layers are kept in {state.kept_in}, continue with --resume"


def _local(plan: Plan) -> Executor:
    """An executor in this process."""
    return LocalExecutor(plan.source, plan.settings.device, plan.settings.compute_dtype)


def calibrate(plan: Plan, state: RunState, executor: Executor | None = None) -> None:
    """Calibrate every layer that the state does not hold yet; raises InputError as its two stages.

    Args:
        plan: of the run.
        state: of the run.
        executor: of the run; None for this process.
    """
    executor = executor or _local(plan)
    calibration = Calibration(plan.source, plan.data, plan.settings, plan.projections, state, executor)
    executor.retry(calibration.run)
    if plan.settings.chooses_bits:
        # Here, while no other run reads a calibration folder that several share.
        measure_rounding(plan.source, plan.settings, plan.projections, state)
    state.end_calibration()
    give_back()


def measured_spectra(plan: Plan, state: RunState) -> Spectra:
    """The spectra of every projection of a calibrated run, and the losses of rounding where bits are chosen.

    Raises:
        InputError: a file of the state is damaged.
    """
    layers, sensitivity = len(plan.projections.layers), plan.settings.sensitivity
    losses = loss_energies(state, layers, sensitivity) if plan.settings.measured else None
    rounding = rounding_losses(state, layers, sensitivity) if plan.settings.chooses_bits else None
    return Spectra(output_energies(state, layers), losses, rounding)


def choose(plan: Plan, state: RunState, say: Say, with_front: bool = True) -> Choice:
    """The ranks and bits of a calibrated run.

    Args:
        plan: of the run.
        state: of the run.
        say: called with one line about the front and one about the choice.
        with_front: say the front's line; many choices of one calibration have one front.

    Raises:
        ChoiceError: no choice reaches the target.
        InputError: a file of the state is damaged, or the latency table lacks a shape.
    """
    spectra = measured_spectra(plan, state)
    front = measured_front(plan.projections, spectra, plan.target)
    if front is not None and with_front:
        say(front_line(plan.settings, front))
    allocation = choose_ranks(plan.projections, spectra, plan.target, front)
    say(ranks_line(plan, allocation))
    return Choice(allocation, front)


def store_layers(
    plan: Plan,
    state: RunState,
    modules: Mapping[str, FactoredModule],
    say: Say,
    executor: Executor | None = None,
) -> bool:
    """Factor, distill and quantize all layers as the module table says; `state.load_factors` then returns the result.

    Args:
        plan: of the run.
        state: of the calibrated run.
        modules: projection name -> its row of the module table.
        say: called with one line after each distillation.
        executor: of the run; None for this process.

    Returns:
        Whether anything was distilled.

    Raises:
        InputError: as of `factor_layers`, `Distillation.run` and `round_layers`.
    """
    executor = executor or _local(plan)
    executor.retry(partial(factor_layers, plan.data, plan.settings, plan.projections, state, modules, executor))
    give_back()
    distillation = Distillation(plan.source, plan.data, plan.settings, plan.projections, state)
    of_factors, of_scales = doses(plan.settings.dose, modules)
    trained = False
    if of_factors is not None:
        plain = {name: replace(module, schemes={}) for name, module in modules.items()}
        trained = distillation.run(of_factors, plain, say)
        give_back()
    if any(module.schemes for module in modules.values()):
        round_layers(plan.source, plan.settings, plan.projections, state, modules)
    if of_scales is not None:
        trained = distillation.run(of_scales, modules, say) or trained
    if plan.settings.dose is not None and of_factors is None and of_scales is None:
        say("no distillation: nothing is factored, and nothing has 4 bits")
    return trained


def _factor_and_write(plan: Plan, state: RunState, say: Say, executor: Executor) -> CompressResult:
    """Choose ranks, factor and write the checkpoint of a calibrated run into the state's folder."""
    plan, tokens = without_uncovered(plan, state, say)
    choice = replace(choose(plan, state, say), tokens=tokens)
    if not store_layers(plan, state, choice.allocation.modules, say, executor):
        plan = replace(plan, settings=replace(plan.settings, dose=None))
    if plan.projections.lm_head is not None:
        head = factor_lm_head(plan.source, plan.settings, plan.projections.lm_head, state.load_lm_head())
        say(lm_head_line(plan.settings, head.report))
        choice = replace(choice, lm_head=head)
    return write_checkpoint(plan, state, choice)


def without_uncovered(plan: Plan, state: RunState, say: Say) -> tuple[Plan, dict[str, int]]:
    """The plan without projections that too few tokens reach, and the tokens of each MoE expert and projector."""
    coverage = find_coverage(plan.projections, plan.settings, state)
    left = coverage.leave_dense(plan.projections, say)
    for option, shares in (("ratio", plan.options.ratio), ("tolerance", plan.options.tolerance)):
        coverage.check_towers_left(left, shares if isinstance(shares, dict) else (), option)
    return plan.with_projections(left), coverage.tokens
