"""Chooses the ranks that a target asks for, of all towers together or of each by itself."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.errors import ChoiceError, InputError
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.pareto import LossFront, loss_front
from pgsvd_vllm.offline.ranks.target import RankTarget
from pgsvd_vllm.offline.ranks.uniform import at_equal_ratio, at_ratio, at_tolerance

Energies = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Spectra:
    """What calibration knows of every projection.

    Attributes:
        output: projection -> eigenvalues of W C W^T, float64, descending.
        loss: projection -> twice the loss of cutting each direction, float64, descending; None where sensitivities
            are taken as equal.
    """

    output: Energies
    loss: Energies | None


def measured_front(projections: ProjectionSet, losses: Energies, target: RankTarget) -> LossFront:
    """The front of size, or latency, and predicted loss.

    Args:
        projections: that may be factored, and those that stay dense.
        losses: `Spectra.loss`.
        target: gives the form and the latencies.

    Raises:
        InputError: the latency table lacks a shape.
    """
    latencies, dense = target.latencies, 0.0
    if latencies is not None:
        dense = sum(latencies.time(p.out_features, p.in_features, target.form, None) for p in projections.ignored)
    return loss_front(projections.flat, losses, projections.ignored_numel, target.form, latencies, dense)


def choose_ranks(
    projections: ProjectionSet, spectra: Spectra, target: RankTarget, front: LossFront | None = None
) -> Allocation:
    """The ranks that a target's ratios or tolerances give; computes next to nothing.

    Args:
        projections: that may be factored.
        spectra: of all of them.
        target: what the ranks must reach.
        front: of all towers, where it is known already.

    Raises:
        ChoiceError: no ranks reach the target.
    """
    targets = target.of_towers()
    if not targets and len(projections.towers) > 1 and target.tolerance is None and spectra.loss is None:
        # Relative errors say nothing of losses, by which towers could be weighed against each other.
        targets = dict.fromkeys(projections.towers, target)
    if not targets:
        return _together(projections, spectra, target, front)
    parts = []
    for tower, own in targets.items():
        part = projections.of_tower(tower)
        try:
            parts.append((_together(part, spectra, own), part))
        except ChoiceError as error:
            raise ChoiceError(f"{tower}: {error}") from None
        except InputError as error:
            raise InputError(f"{tower}: {error}") from None
    removed = sum(allocation.removed * part.numel for allocation, part in parts) / projections.numel
    losses = [allocation.loss for allocation, _ in parts if allocation.loss is not None]
    return Allocation(
        {tower: value for allocation, _ in parts for tower, value in allocation.tolerances.items()},
        {name: rank for allocation, _ in parts for name, rank in allocation.ranks.items()},
        removed,
        None if spectra.loss is None else sum(losses),
    )


def _together(
    projections: ProjectionSet, spectra: Spectra, target: RankTarget, front: LossFront | None = None
) -> Allocation:
    """By one ratio or tolerance for all projections of a set."""
    ratio, tolerance = target.ratio, target.tolerance
    assert not isinstance(ratio, dict)
    assert not isinstance(tolerance, dict)
    flat, ignored = projections.flat, projections.ignored_numel
    if target.equal:
        assert ratio is not None
        return at_equal_ratio(flat, ratio, target.form, ignored)
    if spectra.loss is not None:
        assert ratio is not None
        return (front or measured_front(projections, spectra.loss, target)).at(ratio)
    profiles = {p.name: error_profile(spectra.output[p.name]) for p in flat}
    if tolerance is None:
        assert ratio is not None
        return at_ratio(flat, profiles, ratio, ignored, target.form)
    allocation = at_tolerance(flat, profiles, tolerance, ignored, target.form)
    if not allocation.ranks:
        raise ChoiceError(f"`tolerance` {tolerance}: no projection can be factored with so small an error; raise it")
    return allocation
