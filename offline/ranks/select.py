"""Chooses the ranks that reach a target, for all towers together or for each tower alone."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.errors import ChoiceError, InputError
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.pareto import LossFront, Rounding, loss_front
from pgsvd_vllm.offline.ranks.stored import module_table
from pgsvd_vllm.offline.ranks.target import RankTarget
from pgsvd_vllm.offline.ranks.uniform import at_equal_ratio, at_ratio, at_tolerance

Energies = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Spectra:
    """The spectra of all projections.

    Attributes:
        output: projection -> eigenvalues of W C W^T, float64 [min(out, in)], descending.
        loss: projection -> twice the predicted loss of removing each direction, float64 [min(out, in)], descending (see
            `LayerSensitivity.energy`); None if sensitivities are assumed equal.
        rounding: what quantization costs; None if every projection has the same storage.
    """

    output: Energies
    loss: Energies | None
    rounding: Rounding | None = None


def measured_front(projections: ProjectionSet, spectra: Spectra, target: RankTarget) -> LossFront | None:
    """The Pareto front of size, or GEMM latency, and predicted loss; None if sensitivities are assumed equal.

    Raises:
        InputError: the latency table lacks a shape.
    """
    if spectra.loss is None:
        return None
    return loss_front(projections.flat, spectra.loss, target, projections.ignored, spectra.rounding)


def choose_ranks(
    projections: ProjectionSet, spectra: Spectra, target: RankTarget, front: LossFront | None = None
) -> Allocation:
    """Choose the ranks that reach a target's ratios or tolerances. This takes milliseconds to seconds.

    Args:
        projections: to factor and ignored.
        spectra: of all projections to factor.
        target: that the ranks must reach.
        front: of all towers, if it has been computed already.

    Raises:
        ChoiceError: no ranks reach the target; names the tower if there are several targets.
        InputError: the latency table lacks a shape.
    """
    targets = target.of_towers()
    if not targets and len(projections.towers) > 1 and target.tolerance is None and spectra.loss is None:
        # Without measured losses the errors of different towers cannot be compared: each gets the ratio by itself.
        targets = dict.fromkeys(projections.towers, target)
    if not targets:
        return _joint(projections, spectra, target, front)
    parts = []
    for tower, own in targets.items():
        part = projections.of_tower(tower)
        try:
            parts.append((_joint(part, spectra, own), part))
        except InputError as error:  # a ChoiceError stays one
            raise type(error)(f"{tower}: {error}") from None
    removed = sum(allocation.removed * part.numel for allocation, part in parts) / projections.numel
    losses = [allocation.loss for allocation, _ in parts if allocation.loss is not None]
    # Towers without a target are not factored; where there is a choice of bits they keep their dtype as well.
    others = [p for p in projections.flat if p.tower not in targets] if len(target.storages) == 1 else []
    return Allocation(
        {tower: value for allocation, _ in parts for tower, value in allocation.tolerances.items()},
        module_table(others, {}, target.storages[0])
        | {name: module for allocation, _ in parts for name, module in allocation.modules.items()},
        removed,
        None if spectra.loss is None else sum(losses),
    )


def _joint(
    projections: ProjectionSet, spectra: Spectra, target: RankTarget, front: LossFront | None = None
) -> Allocation:
    """Choose ranks by one ratio or tolerance for all projections of a set."""
    ratio, tolerance = target.ratio, target.tolerance
    assert not isinstance(ratio, dict)
    assert not isinstance(tolerance, dict)
    front = front or measured_front(projections, spectra, target)
    if front is not None and target.loss is not None:
        return front.within(target.loss)
    if front is not None:
        assert ratio is not None
        return front.at(ratio, target.limit)
    flat, ignored, (storage,) = projections.flat, projections.ignored_numel, target.storages
    if target.equal:
        assert ratio is not None
        return at_equal_ratio(flat, ratio, storage, ignored)
    profiles = {p.name: error_profile(spectra.output[p.name]) for p in flat}
    if tolerance is None:
        assert ratio is not None
        return at_ratio(flat, profiles, ratio, ignored, storage)
    allocation = at_tolerance(flat, profiles, tolerance, ignored, storage)
    if not allocation.ranks:
        raise ChoiceError(f"`tolerance` {tolerance}: no projection can be factored within so small an error; raise it")
    return allocation
