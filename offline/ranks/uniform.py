"""Ranks from one uniform tolerance (PGSVD, arXiv 2510.05544, section 4), or from one ratio for every projection."""

from collections.abc import Callable, Sequence

import torch

from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.ranks.allocation import (
    RATIO_SLACK,
    Allocation,
    hardware_rank,
    saves,
    size,
    too_large,
    too_small,
)
from pgsvd_vllm.offline.ranks.error_profile import rank_for

# Halvings that bring the tolerance to the last bit.
BISECTIONS = 80


def at_tolerance(
    projections: Sequence[Projection],
    profiles: dict[str, torch.Tensor],
    tolerance: float,
    ignored: int = 0,
    form: str = "factors",
) -> Allocation:
    """The ranks that one tolerance gives: smallest with e(r) <= tolerance, dense where none saves.

    Args:
        projections: those that may be factored.
        profiles: projection name -> error profile.
        tolerance: bound on the relative error.
        ignored: parameters of the projections that were told to stay dense.
        form: how low-rank matrices are stored.
    """
    ranks, kept, total = {}, ignored, ignored
    for p in projections:
        rank = hardware_rank(p, rank_for(profiles[p.name], tolerance))
        total += p.numel
        if saves(p, rank, form):
            ranks[p.name] = rank
            kept += size(p, rank, form)
        else:
            kept += p.numel
    return Allocation({p.tower: tolerance for p in projections}, ranks, 1 - kept / total)


def at_ratio(
    projections: Sequence[Projection],
    profiles: dict[str, torch.Tensor],
    ratio: float,
    ignored: int = 0,
    form: str = "factors",
) -> Allocation:
    """The tolerance, found by bisection, whose ranks come closest to removing the share `ratio`.

    Args: as of `at_tolerance`; `ratio` is a share of all projections' parameters, ignored ones too.

    Raises:
        ChoiceError: even rank 1 everywhere does not remove that much, or the ranks are too coarse
            to remove so little.
    """

    def at(tolerance: float) -> Allocation:
        return at_tolerance(projections, profiles, tolerance, ignored, form)

    best, above = _closest(at, 0.0, 1.0, ratio)
    if abs(best.removed - ratio) > RATIO_SLACK and not best.ranks:
        raise too_small(ratio, above.removed)
    return best


def _closest(at: Callable[[float], Allocation], low: float, high: float, ratio: float) -> tuple[Allocation, Allocation]:
    """Bisect the tolerance, which removes more the larger it is.

    Returns:
        the allocation closest to `ratio`, and the next one that removes at least as much.

    Raises:
        ChoiceError: even the largest value does not remove that much.
    """
    most = at(high)
    if most.removed < ratio - RATIO_SLACK:
        raise too_large(ratio, most.removed)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if at(middle).removed < ratio:
            low = middle
        else:
            high = middle
    below, above = at(low), at(high)
    return min((below, above), key=lambda a: abs(a.removed - ratio)), above


def at_equal_ratio(projections: Sequence[Projection], ratio: float, form: str, ignored: int = 0) -> Allocation:
    """Every projection loses the same share: the largest rank that leaves at most (1 - ratio) of its numbers.

    Args:
        projections: those that are factored.
        ratio: share of each one's parameters.
        form: how low-rank matrices are stored.
        ignored: parameters of the projections that were told to stay dense.
    """
    ranks, kept, total = {}, ignored, ignored
    for p in projections:
        limit = (1 - ratio) * p.numel
        fitting = [r for r in range(1, min(p.out_features, p.in_features) + 1) if saves(p, r, form)]
        fitting = [r for r in fitting if size(p, r, form) <= limit] or fitting[:1]
        total += p.numel
        if fitting:
            ranks[p.name] = fitting[-1]
            kept += size(p, fitting[-1], form)
        else:
            kept += p.numel
    return Allocation({}, ranks, 1 - kept / total)
