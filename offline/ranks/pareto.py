"""The Pareto front of size, or GEMM latency, and predicted loss: the ranks with the least loss for every size."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.latency_table import LatencyTable
from pgsvd_vllm.offline.linalg import tail_energy
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.ranks.allocation import (
    RATIO_SLACK,
    Allocation,
    hardware_rank,
    saves,
    size,
    too_large,
    too_small,
)
from pgsvd_vllm.offline.ranks.target import RankTarget

# Least share of a projection's cost that a rank must save. A second GEMM has a fixed latency, and without this limit
# nearly every projection would be factored, many for a saving of 2 to 7 % (docs/dev/log.md).
LEAST_SAVING = 0.1


def pays(cost: float, dense: float) -> bool:
    """Whether a low-rank weight costs at least LEAST_SAVING less than the dense one, in elements or microseconds."""
    return cost <= (1 - LEAST_SAVING) * dense


def check_latency(projections: ProjectionSet, target: RankTarget) -> None:
    """Check before calibration that some ranks remove the requested share of the GEMM latency.

    Args:
        projections: to factor and ignored.
        target: with latencies, and one ratio for all towers.

    Raises:
        ChoiceError: the fastest ranks remove less than the ratio.
        InputError: the table lacks a shape.
    """
    latencies, ratio, form = target.latencies, target.ratio, target.form
    assert latencies is not None
    assert isinstance(ratio, float)
    total = saved = 0.0
    for p in (*projections.flat, *projections.ignored):
        total += latencies.latency(p.out_features, p.in_features, form, None)
    for p in projections.flat:
        dense = latencies.latency(p.out_features, p.in_features, form, None)
        step = hardware_rank(p, 1)
        ranks = [r for r in range(step, min(p.out_features, p.in_features) + 1, step) if saves(p, r, form)]
        fastest = min((latencies.latency(p.out_features, p.in_features, form, r) for r in ranks), default=dense)
        saved += dense - fastest if pays(fastest, dense) else 0.0
    if saved <= 0:
        raise ChoiceError("`costs`: no low-rank GEMM is clearly faster than the dense one on the serving machine")
    if saved / total < ratio - RATIO_SLACK:
        raise too_large(ratio, saved / total, " of the projections' latency")


@dataclass(frozen=True)
class LossFront:
    """The corners of the lower convex hull of size, or GEMM latency, and predicted loss.

    Corner 0 is the dense model. Each step to the next corner lowers the rank of one projection along its own hull, the
    step with the least loss per saving first. No other ranks of the same size, or latency, have a smaller predicted
    loss.

    Attributes:
        steps: (projection, its new rank), one per corner after corner 0.
        removed: share of all projections' parameters, or of their latency, that each corner removes, ascending.
        losses: predicted loss of each corner, in the units of `Allocation.loss`.
        parameters: share of all projections' parameters that each corner removes.
        by_latency: whether `removed` holds shares of latency.
    """

    steps: list[tuple[str, int]]
    removed: list[float]
    losses: list[float]
    parameters: list[float]
    by_latency: bool = False

    def corner(self, ratio: float) -> int:
        """Index of the corner whose removed share is closest to `ratio`."""
        after = min(bisect_left(self.removed, ratio), len(self.steps))
        return min((max(after - 1, 0), after), key=lambda i: abs(self.removed[i] - ratio))

    def at(self, ratio: float) -> Allocation:
        """The allocation whose removed share is closest to `ratio`.

        Raises:
            ChoiceError: `ratio` is larger than the last corner's share or smaller than the first one's.
        """
        if not self.steps or self.removed[-1] < ratio - RATIO_SLACK:
            raise too_large(ratio, self.removed[-1])
        corner = self.corner(ratio)
        if corner == 0:
            raise too_small(ratio, self.removed[1])
        return Allocation(
            {},
            dict(self.steps[:corner]),
            self.parameters[corner],
            self.losses[corner],
            self.removed[corner] if self.by_latency else None,
        )

    def summary(self, step: float) -> list[tuple[float, float]]:
        """(removed share, predicted loss) of the corners closest to every multiple of `step`."""
        corners = sorted({self.corner(i * step) for i in range(1, int(self.removed[-1] / step) + 1)} - {0})
        return [(self.removed[i], self.losses[i]) for i in corners]


@dataclass(frozen=True)
class _Choice:
    """One way to store a projection: its rank (0 is dense), elements, cost in elements or microseconds, and loss."""

    rank: int
    size: int
    cost: float
    loss: float


def _slope(a: _Choice, b: _Choice) -> float:
    """The loss per unit of saved cost between two choices."""
    return (b.loss - a.loss) / (a.cost - b.cost)


def _hull(projection: Projection, energy: torch.Tensor, form: str, latencies: LatencyTable | None) -> list[_Choice]:
    """The corners of a projection's lower convex hull of cost and loss, from dense to the cheapest.

    The loss per unit of saved cost rises from corner to corner.
    """

    def cost(rank: int | None, stored: int) -> float:
        shape = projection.out_features, projection.in_features
        return stored if latencies is None else latencies.latency(*shape, form, rank)

    step = hardware_rank(projection, 1)
    tail = (0.5 * tail_energy(energy)).tolist()
    hull = [_Choice(0, projection.numel, cost(None, projection.numel), 0.0)]

    for rank in range(len(energy) // step * step, 0, -step):
        if not saves(projection, rank, form):
            continue
        stored = size(projection, rank, form)
        point = _Choice(rank, stored, cost(rank, stored), tail[rank])
        # Measured latencies need not fall with the rank, nor below the dense GEMM's.
        if point.cost >= hull[-1].cost or not pays(point.cost, hull[0].cost):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def loss_front(
    projections: Sequence[Projection],
    energies: dict[str, torch.Tensor],
    ignored: int = 0,
    form: str = "factors",
    latencies: LatencyTable | None = None,
    ignored_latency: float = 0.0,
) -> LossFront:
    """The Pareto front of size, or GEMM latency, and summed predicted loss of a model.

    Args:
        projections: to factor.
        energies: projection -> twice the predicted loss of removing each direction, float64 [min(out, in)], descending;
            rank r loses half the sum of all elements from r on.
        ignored: parameters of the projections that stay dense.
        form: of the stored low-rank weights, `pivot` or `factors`.
        latencies: GEMM latencies in microseconds; None for the front of sizes.
        ignored_latency: GEMM latency, in microseconds, of the projections that stay dense; 0 without `latencies`.

    Raises:
        InputError: the latency table lacks a shape.
    """
    # Losses add up: the model's hull takes the steps of all projections' hulls in the order of loss per saving.
    steps: list[tuple[float, str, _Choice, _Choice]] = []
    total = float(ignored) if latencies is None else ignored_latency
    for p in projections:
        hull = _hull(p, energies[p.name], form, latencies)
        total += hull[0].cost
        for a, b in itertools.pairwise(hull):
            steps.append((_slope(a, b), p.name, a, b))
    steps.sort(key=lambda step: step[0])
    elements = ignored + sum(p.numel for p in projections)

    def sums(values: Iterable[float]) -> list[float]:
        return list(itertools.accumulate(values, initial=0.0))

    return LossFront(
        [(name, b.rank) for _, name, _, b in steps],
        [saved / total for saved in sums(a.cost - b.cost for _, _, a, b in steps)],
        sums(b.loss - a.loss for _, _, a, b in steps),
        [saved / elements for saved in sums(a.size - b.size for _, _, a, b in steps)],
        latencies is not None,
    )
