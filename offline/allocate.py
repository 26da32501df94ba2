"""From error profiles to ranks, by one uniform tolerance or by measured losses.

PGSVD (arXiv 2510.05544, section 4): with equal sensitivities, giving every layer the same relative
error is optimal for the bi-objective problem of size and error, and yields different ranks. With
measured sensitivities the same problem is: minimise the summed predicted loss for a given size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pgsvd_vllm.checkpoint import stored_size
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model_source import Projection
from pgsvd_vllm.offline.spectrum import rank_for, tail_energy

# Ranks are rounded up to whole hardware tiles where the matrix is large enough not to feel it.
RANK_MULTIPLE = 16
ROUND_FROM = 256
RATIO_SLACK = 0.005
# Halvings that bring either rule's knob to the last bit.
BISECTIONS = 80


@dataclass(frozen=True)
class Allocation:
    """Which projections are factored, and with what rank.

    Attributes:
        tolerance: the uniform bound on every projection's relative error; None where sensitivities
            were measured.
        ranks: projection name -> rank; a projection that stays dense is absent.
        removed: share of the projections' parameters that is removed, ignored ones counted as kept.
    """

    tolerance: float | None
    ranks: dict[str, int]
    removed: float


def size(projection: Projection, rank: int, form: str) -> int:
    """Numbers stored for a projection with a rank in a form."""
    return stored_size(form, projection.out_features, projection.in_features, rank)


def saves(projection: Projection, rank: int, form: str) -> bool:
    """Whether a rank leaves fewer numbers than out * in."""
    fits = form != "pivot" or rank < projection.out_features
    return fits and size(projection, rank, form) < projection.numel


def hardware_rank(projection: Projection, rank: int) -> int:
    """The rank rounded up to RANK_MULTIPLE, for matrices of at least ROUND_FROM rows and columns."""
    if min(projection.out_features, projection.in_features) < ROUND_FROM:
        return rank
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


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
    return Allocation(tolerance, ranks, 1 - kept / total)


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
        InputError: even rank 1 everywhere does not remove that much, or the ranks are too coarse
            to remove so little.
    """

    def at(tolerance: float) -> Allocation:
        return at_tolerance(projections, profiles, tolerance, ignored, form)

    best, above = _closest(at, 0.0, 1.0, ratio)
    if abs(best.removed - ratio) > RATIO_SLACK and not best.ranks:
        raise _too_small(ratio, above)
    return best


def _closest(at: Callable[[float], Allocation], low: float, high: float, ratio: float) -> tuple[Allocation, Allocation]:
    """Bisect a knob that removes more the larger it is.

    Returns:
        the allocation closest to `ratio`, and the next one that removes at least as much.

    Raises:
        InputError: even the largest value of the knob does not remove that much.
    """
    most = at(high)
    if most.removed < ratio - RATIO_SLACK:
        raise InputError(
            f"--ratio {ratio}: more than this model can give; the smallest factors remove {most.removed:.1%}"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if at(middle).removed < ratio:
            low = middle
        else:
            high = middle
    below, above = at(low), at(high)
    return min((below, above), key=lambda a: abs(a.removed - ratio)), above


def _too_small(ratio: float, above: Allocation) -> InputError:
    return InputError(f"--ratio {ratio}: too small for this model; the next possible step is {above.removed:.1%}")


@dataclass(frozen=True)
class _Choices:
    """What one projection may become: its size and predicted loss at every rank, dense last."""

    name: str
    ranks: list[int]
    sizes: torch.Tensor
    losses: torch.Tensor

    def best(self, price: float) -> int:
        """Index of the choice with the least loss + price * size."""
        return int((self.losses + price * self.sizes).argmin())


def _choices(projection: Projection, energy: torch.Tensor, form: str) -> _Choices:
    step = hardware_rank(projection, 1)
    ranks = [r for r in range(step, len(energy) + 1, step) if saves(projection, r, form)]
    sizes = [size(projection, r, form) for r in ranks]
    return _Choices(
        projection.name,
        ranks,
        torch.tensor([*sizes, projection.numel], dtype=torch.float64),
        torch.cat([0.5 * tail_energy(energy)[ranks], energy.new_zeros(1)]),
    )


def by_loss(
    projections: Sequence[Projection],
    energies: dict[str, torch.Tensor],
    ratio: float,
    ignored: int = 0,
    form: str = "factors",
) -> Allocation:
    """The ranks with the least summed predicted loss that remove the share `ratio`.

    Every projection takes the rank that minimises loss + price * size, and the price is found by
    bisection: the solutions are the corners of the lower convex hull of the loss-size front.

    Args:
        projections: those that may be factored.
        energies: projection -> eigenvalues of L^T W C W^T L, descending, in nats a token; cutting
            at rank r loses half of what lies beyond it.
        ratio: share of all projections' parameters, ignored ones too.
        ignored: parameters of the projections that were told to stay dense.
        form: how low-rank matrices are stored.

    Raises:
        InputError: no ranks remove that much, or so little.
    """
    choices = [_choices(p, energies[p.name], form) for p in projections]
    total = ignored + sum(p.numel for p in projections)

    def at(price: float) -> Allocation:
        picked = [c.best(price) for c in choices]
        kept = ignored + sum(float(c.sizes[i]) for c, i in zip(choices, picked, strict=True))
        ranks = {c.name: c.ranks[i] for c, i in zip(choices, picked, strict=True) if i < len(c.ranks)}
        return Allocation(None, ranks, 1 - kept / total)

    # The knob is the logarithm of the price.
    best, above = _closest(lambda knob: at(math.exp(knob)), -60.0, 60.0, ratio)
    if not best.ranks:
        raise _too_small(ratio, above)
    return best
