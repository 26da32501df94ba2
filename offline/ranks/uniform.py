"""Chooses ranks by one uniform tolerance (PGSVD, arXiv 2510.05544, section 4) or one ratio for every projection."""

from collections.abc import Callable, Sequence

import torch

from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.ranks.allocation import RATIO_SLACK, Allocation, too_large, too_small
from pgsvd_vllm.offline.ranks.error_profile import rank_for
from pgsvd_vllm.offline.ranks.stored import hardware_rank, module_table, rank_step, saves, size
from pgsvd_vllm.offline.settings import Storage

FACTORS = Storage("factors")
# Bisection steps that determine the tolerance to the last bit of float64.
BISECTIONS = 80


def at_tolerance(
    projections: Sequence[Projection],
    profiles: dict[str, torch.Tensor],
    tolerance: float,
    ignored: int = 0,
    storage: Storage = FACTORS,
) -> Allocation:
    """Give every projection its smallest rank r with e(r) <= tolerance; it stays dense if that rank saves nothing.

    Args:
        projections: to factor.
        profiles: projection name -> error profile, float64 [min(out, in) + 1].
        tolerance: bound on the relative output error, 0 to 1.
        ignored: parameters of the projections that stay dense.
        storage: of all projections.
    """
    ranks, kept, total = {}, ignored, ignored
    for p in projections:
        rank = hardware_rank(p, rank_for(profiles[p.name], tolerance), storage)
        total += p.numel
        if saves(p, rank, storage.form):
            ranks[p.name] = rank
            kept += size(p, rank, storage.form)
        else:
            kept += p.numel
    modules = module_table(projections, ranks, storage)
    return Allocation({p.tower: tolerance for p in projections}, modules, 1 - kept / total)


def at_ratio(
    projections: Sequence[Projection],
    profiles: dict[str, torch.Tensor],
    ratio: float,
    ignored: int = 0,
    storage: Storage = FACTORS,
) -> Allocation:
    """Find, by bisection, the tolerance whose ranks remove the share closest to `ratio`.

    Args:
        projections: to factor.
        profiles: projection name -> error profile, float64 [min(out, in) + 1].
        ratio: share of all projections' parameters to remove, 0 to 1, ignored ones included.
        ignored: parameters of the projections that stay dense.
        storage: of all projections.

    Raises:
        ChoiceError: rank 1 in every projection removes less than `ratio`, or `ratio` is below the smallest step.
    """

    def at(tolerance: float) -> Allocation:
        return at_tolerance(projections, profiles, tolerance, ignored, storage)

    best, above = _closest(at, 0.0, 1.0, ratio)
    if not best.ranks:
        raise too_small(ratio, above.removed)
    return best


def _closest(at: Callable[[float], Allocation], low: float, high: float, ratio: float) -> tuple[Allocation, Allocation]:
    """Bisect the tolerance between `low` and `high`; a larger tolerance removes more.

    Returns:
        The allocation closest to `ratio`, and the smallest one that removes at least `ratio`.

    Raises:
        ChoiceError: the tolerance `high` removes less than `ratio`.
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


def at_equal_ratio(projections: Sequence[Projection], ratio: float, storage: Storage, ignored: int = 0) -> Allocation:
    """Give every projection the largest rank that stores at most (1 - ratio) of its elements, as baselines do.

    Args:
        projections: to factor.
        ratio: share of each projection's parameters to remove, 0 to 1.
        storage: of all projections.
        ignored: parameters of the projections that stay dense.
    """
    ranks, kept, total = {}, ignored, ignored
    for p in projections:
        limit = (1 - ratio) * p.numel
        # Other tools do not round ranks.
        step = 1 if storage.scheme is None or storage.scheme.group_size is None else rank_step(p, storage)
        fitting = [r for r in range(step, min(p.out_features, p.in_features) + 1, step) if saves(p, r, storage.form)]
        fitting = [r for r in fitting if size(p, r, storage.form) <= limit] or fitting[:1]
        total += p.numel
        if fitting:
            ranks[p.name] = fitting[-1]
            kept += size(p, fitting[-1], storage.form)
        else:
            kept += p.numel
    return Allocation({}, module_table(projections, ranks, storage), 1 - kept / total)
