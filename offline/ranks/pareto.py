"""The Pareto front of size, or latency, and predicted loss."""

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

# Share of a projection's cost that ranks by measured losses save at least. A product more costs some time
# whatever its size, and by size nearly every projection would be cut, many by 2 to 7 % (docs/dev/log.md).
LEAST_SAVING = 0.1


def pays(cost: float, dense: float) -> bool:
    """Whether a low-rank GEMM costs clearly less than the dense one."""
    return cost <= (1 - LEAST_SAVING) * dense


def check_latency(projections: ProjectionSet, target: RankTarget) -> None:
    """Refuse, before anything is calibrated, a share of the latency that no ranks remove.

    Args:
        projections: that may be factored, and those that stay dense.
        target: with latencies, and one ratio for all towers.

    Raises:
        ChoiceError: the fastest GEMMs do not remove that much.
        InputError: the table lacks a shape.
    """
    latencies, ratio, form = target.latencies, target.ratio, target.form
    assert latencies is not None
    assert isinstance(ratio, float)
    total = saved = 0.0
    for p in (*projections.flat, *projections.ignored):
        total += latencies.time(p.out_features, p.in_features, form, None)
    for p in projections.flat:
        dense = latencies.time(p.out_features, p.in_features, form, None)
        step = hardware_rank(p, 1)
        ranks = [r for r in range(step, min(p.out_features, p.in_features) + 1, step) if saves(p, r, form)]
        fastest = min((latencies.time(p.out_features, p.in_features, form, r) for r in ranks), default=dense)
        saved += dense - fastest if pays(fastest, dense) else 0.0
    if saved <= 0:
        raise ChoiceError("`costs`: no low-rank GEMM is clearly faster than the dense one on that machine")
    if saved / total < ratio - RATIO_SLACK:
        raise too_large(ratio, saved / total, " of the projections' latency")


@dataclass(frozen=True)
class LossFront:
    """Every size worth choosing, and its predicted loss: the corners of the front's lower convex hull.

    Corner 0 is the dense model. Each step to the next one takes one projection to a smaller size of
    its own hull, the cheapest step first: no other ranks of the same size lose less. Where times are
    known, time takes the place of size.

    Attributes:
        steps: (projection, its new rank), in order.
        removed: share of all projections' parameters, or of their time, that each corner removes, ascending.
        losses: predicted loss of each corner, nats a token.
        parameters: share of all projections' parameters that each corner removes.
        by_time: whether `removed` are shares of time.
    """

    steps: list[tuple[str, int]]
    removed: list[float]
    losses: list[float]
    parameters: list[float]
    by_time: bool = False

    def corner(self, ratio: float) -> int:
        """Index of the corner that removes the share closest to `ratio`."""
        after = min(bisect_left(self.removed, ratio), len(self.steps))
        return min((max(after - 1, 0), after), key=lambda i: abs(self.removed[i] - ratio))

    def at(self, ratio: float) -> Allocation:
        """The allocation whose removed share is closest to `ratio`.

        Raises:
            ChoiceError: no corner removes that much, or so little.
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
            self.removed[corner] if self.by_time else None,
        )

    def summary(self, step: float) -> list[tuple[float, float]]:
        """(removed share, predicted loss) at the corners closest to every `step` of the share."""
        corners = sorted({self.corner(i * step) for i in range(1, int(self.removed[-1] / step) + 1)} - {0})
        return [(self.removed[i], self.losses[i]) for i in corners]


@dataclass(frozen=True)
class _Choice:
    """One way to store a projection: rank 0 is dense."""

    rank: int
    size: int
    cost: float
    loss: float


def _hull(projection: Projection, energy: torch.Tensor, form: str, costs: LatencyTable | None) -> list[_Choice]:
    """The projection's choices worth taking, from dense to the cheapest.

    The loss for each unit of cost saved rises from one to the next.
    """

    def cost(rank: int | None, stored: int) -> float:
        shape = projection.out_features, projection.in_features
        return stored if costs is None else costs.time(*shape, form, rank)

    step = hardware_rank(projection, 1)
    tail = (0.5 * tail_energy(energy)).tolist()
    hull = [_Choice(0, projection.numel, cost(None, projection.numel), 0.0)]

    def price(a: _Choice, b: _Choice) -> float:
        return (b.loss - a.loss) / (a.cost - b.cost)

    for rank in range(len(energy) // step * step, 0, -step):
        if not saves(projection, rank, form):
            continue
        stored = size(projection, rank, form)
        point = _Choice(rank, stored, cost(rank, stored), tail[rank])
        # Measured times need not fall with the rank, nor below the dense product's.
        if point.cost >= hull[-1].cost or not pays(point.cost, hull[0].cost):
            continue
        while len(hull) > 1 and price(hull[-2], hull[-1]) >= price(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def loss_front(
    projections: Sequence[Projection],
    energies: dict[str, torch.Tensor],
    ignored: int = 0,
    form: str = "factors",
    costs: LatencyTable | None = None,
    ignored_time: float = 0.0,
) -> LossFront:
    """The front of size, or time, and summed predicted loss: ranks for every share that can be removed.

    Args:
        projections: those that may be factored.
        energies: projection -> eigenvalues of L^T W C W^T L, descending, in nats a token; cutting
            at rank r loses half of what lies beyond it.
        ignored: parameters of the projections that were told to stay dense.
        form: how low-rank matrices are stored.
        costs: what products take; None for the front of sizes.
        ignored_time: of the projections that were told to stay dense, where `costs` is given.

    Raises:
        InputError: the table lacks a shape.
    """
    # Losses add up, so the model's hull has the steps of all projections' hulls in the order of their price.
    steps: list[tuple[float, str, _Choice, _Choice]] = []
    total = float(ignored) if costs is None else ignored_time
    for p in projections:
        hull = _hull(p, energies[p.name], form, costs)
        total += hull[0].cost
        for a, b in itertools.pairwise(hull):
            steps.append(((b.loss - a.loss) / (a.cost - b.cost), p.name, a, b))
    steps.sort(key=lambda step: step[0])
    numbers = ignored + sum(p.numel for p in projections)

    def sums(values: Iterable[float]) -> list[float]:
        return list(itertools.accumulate(values, initial=0.0))

    return LossFront(
        [(name, b.rank) for _, name, _, b in steps],
        [saved / total for saved in sums(a.cost - b.cost for _, _, a, b in steps)],
        sums(b.loss - a.loss for _, _, a, b in steps),
        [saved / numbers for saved in sums(a.size - b.size for _, _, a, b in steps)],
        costs is not None,
    )
