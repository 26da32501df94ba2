"""Makes the plan of a request that fits the machine, and opens the state of its run."""

from collections.abc import Callable
from dataclasses import replace

from pgsvd_vllm.offline.options import BUILTIN, SELF, CompressOptions
from pgsvd_vllm.offline.planning.fit_memory import check_memory, fit_activations, fit_distillation, fit_gradients
from pgsvd_vllm.offline.planning.identity import DATASET, DISTILLATION, LEFT_OUT, SAMPLES, SERVE_ON, manifest
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.ranks.pareto import check_latency, check_size
from pgsvd_vllm.offline.run_state import RunState, measured_layers, recorded_settings
from pgsvd_vllm.offline.settings import FORWARD, MEASURED


def prepare(options: CompressOptions, say: Callable[[str], None]) -> Plan:
    """The plan of a request, with every setting resolved.

    A resumed run measures sensitivities as when it began, regardless of the memory that is free now, leaves out the
    distillation that did not fit into memory, and keeps the defaults of the machine where it began.

    Args:
        options: the request.
        say: called with one line for each part that does not fit in memory.

    Raises:
        InputError: as of `make_plan`, no choice reaches the requested latency or size, or the plan exceeds the memory
            budget.
        CheckpointError: a file of the model is missing or damaged.
    """
    recorded = recorded_settings(options.output) if options.resume else {}
    plan = make_plan(_as_begun(options, recorded))
    if plan.latencies is not None and plan.target.loss is None:
        check_latency(plan.projections, plan.target)
    if plan.target.itemsizes is not None and plan.target.loss is None:
        check_size(plan.projections, plan.target)
    if recorded.get(DISTILLATION) == LEFT_OUT and plan.settings.dose is not None and plan.settings.dose.by_default:
        plan = plan.without_distillation()
    plan = fit_distillation(plan, say)
    if options.sensitivity is None and plan.settings.sensitivity == MEASURED:
        begun = _begun(options, len(plan.projections.layers), recorded)
        plan = fit_gradients(plan, say) if begun is None else plan.with_sensitivity(begun)
    plan = fit_activations(plan, say)
    check_memory(plan, _is_measured(options, plan), say)
    return plan


def _is_measured(options: CompressOptions, plan: Plan) -> bool:
    """Whether the calibration folder, or the interrupted run, has all sensitivities already."""
    own = options.output.with_name(f"{options.output.name}.partial") / "layers"
    folder = options.calibration or (own if options.resume else None)
    return folder is not None and measured_layers(folder, plan.settings.sensitivity) == len(plan.projections.layers)


def _as_begun(options: CompressOptions, recorded: dict[str, str]) -> CompressOptions:
    """The options of a resumed run with the recorded defaults that depend on the machine."""
    if options.serve_on is None and recorded.get(SERVE_ON) in ("cpu", "gpu"):
        options = replace(options, serve_on=recorded[SERVE_ON])
    if options.dataset is None and recorded.get(DATASET) in (SELF, BUILTIN):
        options = replace(options, dataset=(recorded[DATASET],))
    if options.num_calibration_samples is None and recorded.get(SAMPLES, "").isdecimal():
        options = replace(options, num_calibration_samples=int(recorded[SAMPLES]))
    return options


def _begun(options: CompressOptions, layers: int, recorded: dict[str, str]) -> str | None:
    """The sensitivity method that earlier work of this run, or the calibration folder, has settled."""
    if options.calibration is not None and measured_layers(options.calibration, MEASURED) == layers:
        return MEASURED  # nothing is left to measure
    found = recorded.get("sensitivity")
    return found if found in (MEASURED, FORWARD) else None


def open_state(plan: Plan, say: Callable[[str], None] = lambda _line: None) -> RunState:
    """Create or reopen the folder of the plan's run.

    Args:
        plan: of the run.
        say: called with the lines of `RunState`.

    Raises:
        InputError: as of `RunState`, or a file of the model cannot be read.
    """
    options = plan.options
    return RunState(options.output, manifest(plan), options.resume, options.calibration, say)
