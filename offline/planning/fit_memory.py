"""Changes a plan whose stages do not fit into memory, or refuses it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.model.free_memory import free_memory, least
from pgsvd_vllm.offline.planning.memory import (
    CALIBRATION,
    DISTILLATION,
    FACTORS,
    GRADIENTS,
    LM_HEAD,
    PROGRAM_BYTES,
    QUANTIZATION,
    batch_tokens,
    factors_bytes,
    fitted_tokens,
    stage_bytes,
)
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.settings import FORWARD, MEASURED

Say = Callable[[str], None]
# Stage -> what makes it smaller.
ADVICE = {
    CALIBRATION: "take fewer --num-calibration-samples",
    LM_HEAD: "omit --include lm_head",
    GRADIENTS: "choose --sensitivity forward",
    FACTORS: "take fewer --num-calibration-samples, or --no-sequential",
    DISTILLATION: "choose --refine 0",
    QUANTIZATION: "omit --bits",
}


def available(plan: Plan) -> int | None:
    """Bytes of memory that the stages of a run may take, what is loaded already included; None if unknown.

    This is the memory budget, or what the device or the machine with its containers can give, if that is less.
    """
    free = free_memory(plan.settings.device)
    loaded = PROGRAM_BYTES + sum(p.nbytes for p in plan.source.model.parameters() if not p.is_meta)
    return least(None if free is None else free + loaded, plan.options.memory_budget)


def fit_distillation(plan: Plan, say: Say) -> Plan:
    """The plan, or one without distillation if that does not fit into memory and nobody has asked for it.

    Args:
        plan: to fit.
        say: called with one line if the plan changes.
    """
    room, dose = available(plan), plan.settings.dose
    if room is None or dose is None or not dose.by_default:
        return plan
    needed = stage_bytes(plan)[DISTILLATION]
    if needed <= room:
        return plan
    say(f"WARNING: distillation needs about {bytes_text(needed)} of memory, {bytes_text(room)} are available: it is "
        "left out")  # fmt: skip
    return plan.without_distillation()


def fit_gradients(plan: Plan, say: Say) -> Plan:
    """The plan, or one with sensitivities from forward passes alone if gradients do not fit into memory.

    Only the default changes; a sensitivity that the user requested is kept.

    Args:
        plan: to fit.
        say: called with one line if the plan changes.
    """
    room = available(plan)
    if room is None or plan.options.sensitivity is not None or plan.settings.sensitivity != MEASURED:
        return plan
    needed = stage_bytes(plan)[GRADIENTS]
    if needed <= room:
        return plan
    say(
        f"WARNING: measuring loss gradients needs about {bytes_text(needed)} of memory, {bytes_text(room)} are "
        "available: sensitivities come from forward passes alone, which is less accurate (`sensitivity` measured "
        "forces gradients)"
    )
    return plan.with_sensitivity(FORWARD)


def fit_activations(plan: Plan, say: Say) -> Plan:
    """The plan, or one whose layer-by-layer fit keeps fewer activations and takes longer.

    Args:
        plan: to fit.
        say: called with one line if the plan changes.
    """
    room = available(plan)
    if room is None or not plan.settings.sequential:
        return plan
    smallest: tuple[int, Plan] | None = None
    for kept in _kept_tokens(plan):
        choice = replace(plan, settings=replace(plan.settings, kept_tokens=kept))
        needed = factors_bytes(choice)
        if smallest is None or needed < smallest[0]:
            smallest = needed, choice
        if needed <= room:
            break
    assert smallest is not None
    kept = smallest[1].settings.kept_tokens
    if kept is not None:
        tokens = f"{kept} of {fitted_tokens(plan)} tokens"
        say(f"memory: the layer-by-layer fit keeps the activations of {tokens} and computes the others again")
    return smallest[1]


def _kept_tokens(plan: Plan) -> Iterator[int | None]:
    """The choices of `RunSettings.kept_tokens`: all, then one batch less each time."""
    step = batch_tokens(plan)
    yield None
    yield from range((fitted_tokens(plan) - 1) // step * step, 0, -step)


def check_memory(plan: Plan, measured: bool, say: Say) -> None:
    """Refuse a plan that exceeds a requested memory budget, and warn if it exceeds what is free.

    A resumed run gets the warning alone, since some of its stages may be finished.

    Args:
        plan: that fits as well as it can.
        measured: whether the calibration is complete.
        say: called with the warning.

    Raises:
        InputError: names the stage, what it needs, and what to do.
    """
    room, budget = available(plan), plan.options.memory_budget
    stages = stage_bytes(plan)
    if measured:
        stages = {stage: needed for stage, needed in stages.items() if stage not in (CALIBRATION, LM_HEAD, GRADIENTS)}
    stage = max(stages, key=stages.__getitem__)
    if room is None or stages[stage] <= room:
        return
    needs = f"the stage {stage} needs about {bytes_text(stages[stage])} of memory"
    if budget is not None and stages[stage] > budget and not plan.options.resume:
        raise InputError(f"--memory-budget {bytes_text(budget)}: {needs}; give more, or {ADVICE[stage]}")
    say(f"WARNING: {needs}, {bytes_text(room)} are available: the run may end for lack of memory; {ADVICE[stage]}")
