"""Chooses the ranks that a plan asks for, of all towers together or of each by itself."""

from dataclasses import replace

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.options import DEFAULT_RATIO
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.pareto import LossFront, loss_front
from pgsvd_vllm.offline.ranks.uniform import at_equal_ratio, at_ratio, at_tolerance
from pgsvd_vllm.offline.run.plan import Plan
from pgsvd_vllm.offline.run.state import RunState


def choose_ranks(plan: Plan, workspace: RunState, front: LossFront | None) -> Allocation:
    """The ranks that the plan's ratios or tolerances give; reads calibration, computes next to nothing.

    Args:
        plan, workspace: calibrated.
        front: of sizes and losses of all towers; None where sensitivities are not measured.

    Raises:
        InputError: no ranks give that.
    """
    options = plan.options
    if isinstance(options.ratio, dict):
        asked = {tower: replace(options, ratio=share) for tower, share in options.ratio.items()}
    elif isinstance(options.tolerance, dict):
        asked = {tower: replace(options, tolerance=share) for tower, share in options.tolerance.items()}
    elif len(plan.towers) > 1 and options.tolerance is None and not plan.measured:
        # Relative errors say nothing of losses, by which towers could be weighed against each other.
        asked = dict.fromkeys(plan.towers, options)
    else:
        return _together(plan, workspace, front)
    parts = []
    for tower, own in asked.items():
        part = replace(
            plan,
            projections=[[p for p in row if p.tower == tower] for row in plan.projections],
            ignored=[p for p in plan.ignored if p.tower == tower],
            options=own,
        )
        try:
            parts.append((_together(part, workspace, measured_front(part, workspace) if plan.measured else None), part))
        except InputError as error:
            raise InputError(f"{tower}: {error}") from None
    numbers = sum(p.numel for p in (*plan.flat, *plan.ignored))
    removed = sum(a.removed * sum(p.numel for p in (*part.flat, *part.ignored)) for a, part in parts) / numbers
    losses = [allocation.loss for allocation, _ in parts if allocation.loss is not None]
    return Allocation(
        {tower: value for allocation, _ in parts for tower, value in allocation.tolerances.items()},
        {name: rank for allocation, _ in parts for name, rank in allocation.ranks.items()},
        removed,
        sum(losses) if plan.measured else None,
    )


def _together(plan: Plan, workspace: RunState, front: LossFront | None) -> Allocation:
    """By one ratio or tolerance for all of a plan's projections."""
    ratio, tolerance = plan.options.ratio, plan.options.tolerance
    assert not isinstance(ratio, dict)
    assert not isinstance(tolerance, dict)
    ratio = DEFAULT_RATIO if ratio is None else ratio
    if plan.options.baseline is not None:
        return at_equal_ratio(plan.flat, ratio, plan.form, plan.ignored_parameters)
    if front is not None:
        return front.at(ratio)
    energies = output_energies(plan, workspace)
    profiles = {p.name: error_profile(energies[p.name]) for p in plan.flat}
    if tolerance is None:
        return at_ratio(plan.flat, profiles, ratio, plan.ignored_parameters, plan.form)
    allocation = at_tolerance(plan.flat, profiles, tolerance, plan.ignored_parameters, plan.form)
    if not allocation.ranks:
        raise InputError(f"--tolerance {tolerance}: no projection can be factored with so small an error; raise it")
    return allocation


def output_energies(plan: Plan, workspace: RunState) -> dict[str, torch.Tensor]:
    """Projection -> eigenvalues of W C W^T, descending, of every layer in the workspace."""
    found: dict[str, torch.Tensor] = {}
    for index in range(len(plan.projections)):
        found.update(workspace.load_layer(index, with_grams=False).energy)
    return found


def loss_energies(plan: Plan, workspace: RunState) -> dict[str, torch.Tensor]:
    """Projection -> twice what cutting each direction costs, descending, of every layer in the workspace."""
    found: dict[str, torch.Tensor] = {}
    for index in range(len(plan.projections)):
        found.update(workspace.load_sensitivity(index, plan.sensitivity, with_matrices=False).energy)
    return found


def measured_front(plan: Plan, workspace: RunState) -> LossFront:
    """LayerShape, or times, and predicted losses, from the sensitivities that the workspace holds."""
    energies, costs = loss_energies(plan, workspace), plan.costs
    time = (
        0.0 if costs is None else sum(costs.time(p.out_features, p.in_features, plan.form, None) for p in plan.ignored)
    )
    return loss_front(plan.flat, energies, plan.ignored_parameters, plan.form, costs, time)
