"""The Pareto front of size, or GEMM latency, and predicted loss: the ranks and bits with the least loss for a size."""

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.linalg import tail_energy
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.ranks.allocation import RATIO_SLACK, Allocation, too_large, too_small
from pgsvd_vllm.offline.ranks.stored import PLAIN, module_of, rank_step, saves, size
from pgsvd_vllm.offline.ranks.target import Limit, RankTarget
from pgsvd_vllm.offline.settings import Storage

# Least share of a projection's cost that a rank must save. A second GEMM has a fixed latency, and without this limit
# nearly every projection would be factored, many for a saving of 2 to 7 % (docs/dev/log.md).
LEAST_SAVING = 0.1
# The fit to compressed activations and distillation leave half of the predicted loss of a rank, rounding loses what is
# predicted: its losses count as much more beside those of ranks (docs/dev/log.md).
ROUNDED = 2.0
# Loss of rounding the matrices of a form over that of rounding the dense weight (docs/dev/log.md).
FACTORED = {"factors": 1.1, "pivot": 10.0}


def pays(cost: float, dense: float) -> bool:
    """Whether a low-rank weight costs at least LEAST_SAVING less than the dense one, in elements or microseconds."""
    return cost <= (1 - LEAST_SAVING) * dense


def check_latency(projections: ProjectionSet, target: RankTarget) -> None:
    """Check before calibration that some ranks remove the requested share of the GEMM latency.

    Args:
        projections: to factor and ignored.
        target: with latencies, one storage, and one ratio for all towers.

    Raises:
        ChoiceError: the fastest ranks remove less than the ratio.
        InputError: the table lacks a shape.
    """
    ratio, (storage,) = target.ratio, target.storages
    assert isinstance(ratio, float)
    total = saved = 0.0
    for p in projections.every:
        total += target.cost(p, PLAIN)
    for p in projections.flat:
        dense, step = target.cost(p, PLAIN), rank_step(p, storage)
        ranks = [r for r in range(step, min(p.out_features, p.in_features) + 1, step) if saves(p, r, storage.form)]
        fastest = min((target.cost(p, module_of(p, r, storage)) for r in ranks), default=dense)
        saved += dense - fastest if pays(fastest, dense) else 0.0
    if saved <= 0:
        raise ChoiceError("`costs`: no low-rank GEMM is clearly faster than the dense one on the serving machine")
    if target.limit is not None and saved / total < ratio:
        raise target.limit.beyond(saved / total)
    if saved / total < ratio - RATIO_SLACK:
        raise too_large(ratio, saved / total, " of the projections' latency")


@dataclass(frozen=True)
class Rounding:
    """What quantization costs, and which projections must be quantized alike.

    Attributes:
        losses: projection -> key of a scheme -> predicted loss of rounding the dense weight, in the units of
            `Allocation.loss`.
        leaders: projection -> the first projection with the same input. vLLM merges some of these into one layer, whose
            matrices have one scheme.
    """

    losses: Mapping[str, Mapping[str, float]]
    leaders: Mapping[str, str]

    def loss(self, projection: Projection, storage: Storage, rank: int | None) -> float:
        """The predicted loss of rounding a projection, as comparable to that of ranks; 0 where it keeps its dtype."""
        scheme = module_of(projection, None, storage).schemes.get("weight")
        if scheme is None:
            return 0.0
        return ROUNDED * self.losses[projection.name][scheme.key] * (1.0 if rank is None else FACTORED[storage.form])


def check_size(projections: ProjectionSet, target: RankTarget) -> None:
    """Check before calibration that the smallest choices are as small as requested.

    Args:
        projections: to factor and ignored.
        target: with `itemsizes`.

    Raises:
        ChoiceError: they are larger.
    """
    silent = {p.name: torch.zeros(min(p.out_features, p.in_features), dtype=torch.float64) for p in projections.flat}
    for tower, own in (target.of_towers() or {"": target}).items():
        part = projections.of_tower(tower) if tower else projections
        free = Rounding({p.name: defaultdict(float) for p in part.flat}, {p.name: p.name for p in part.flat})
        assert isinstance(own.ratio, float)
        loss_front(part.flat, silent, own, part.ignored, free).check(own.ratio, own.limit)


@dataclass(frozen=True)
class LossFront:
    """The corners of the lower convex hull of size, or GEMM latency, and predicted loss.

    Corner 0 has the choices without loss: the dense model, quantized if there is no other choice. Each step to the next
    corner changes one projection, or all projections with the same input, along their own hull, the step with the least
    loss per saving first. No other ranks and bits of the same size, or latency, have a smaller predicted loss.

    Attributes:
        start: the modules of corner 0.
        steps: the modules that change, one mapping per corner after corner 0.
        removed: share that each corner removes of all projections' parameters, latency or bytes, ascending.
        losses: predicted loss of each corner, in the units of `Allocation.loss`.
        parameters: share of all projections' parameters that each corner removes.
        unit: of `removed`: `parameters`, `latency` or `bytes`.
    """

    start: dict[str, FactoredModule]
    steps: list[dict[str, FactoredModule]]
    removed: list[float]
    losses: list[float]
    parameters: list[float]
    unit: str

    def corner(self, ratio: float) -> int:
        """Index of the corner whose removed share is closest to `ratio`."""
        after = min(bisect_left(self.removed, ratio), len(self.steps))
        return min((max(after - 1, 0), after), key=lambda i: abs(self.removed[i] - ratio))

    def check(self, ratio: float, limit: Limit | None) -> None:
        """Raise ChoiceError if `ratio` is larger than the last corner's share."""
        most = self.removed[-1]
        if limit is not None and most < ratio:
            raise limit.beyond(most)
        if limit is None and most < ratio - RATIO_SLACK:
            raise too_large(ratio, most)

    def at(self, ratio: float, limit: Limit | None = None) -> Allocation:
        """The allocation whose removed share is closest to `ratio`.

        Args:
            ratio: share to remove.
            limit: that `ratio` stands for: take the smallest share that is not less.

        Raises:
            ChoiceError: `ratio` is larger than the last corner's share or smaller than the first one's.
        """
        self.check(ratio, limit)
        corner = self.corner(ratio) if limit is None else bisect_left(self.removed, ratio)
        if corner == 0 and limit is None:
            raise too_small(ratio, self.removed[min(1, len(self.steps))])
        return self._allocation(corner)

    def within(self, loss: float) -> Allocation:
        """The allocation that removes most within a predicted loss.

        Args:
            loss: in the units of `Allocation.loss`.

        Raises:
            ChoiceError: the first corner that removes anything has a larger one.
        """
        corner = bisect_right(self.losses, loss) - 1
        if corner < 1:
            least = self.losses[min(1, len(self.steps))]
            raise ChoiceError(
                f"`target_loss` {loss}: too small for this model; the smallest possible one is {least:.2g}"
            )
        return self._allocation(corner)

    def _allocation(self, corner: int) -> Allocation:
        modules = dict(self.start)
        for step in self.steps[:corner]:
            modules.update(step)
        return Allocation(
            {},
            {name: module for name, module in modules.items() if module != PLAIN},
            self.parameters[corner],
            self.losses[corner],
            self.removed[corner] if self.unit == "latency" else None,
        )

    def summary(self, step: float) -> list[tuple[float, float]]:
        """(removed share, predicted loss) of the corners closest to every multiple of `step`."""
        corners = sorted({self.corner(i * step) for i in range(1, int(self.removed[-1] / step) + 1)} - {0})
        return [(self.removed[i], self.losses[i]) for i in corners]


@dataclass(frozen=True)
class _Choice:
    """One way to store some projections: their modules, elements, cost in the unit of the front, and loss."""

    modules: dict[str, FactoredModule]
    size: int
    cost: float
    loss: float


def _slope(a: _Choice, b: _Choice) -> float:
    """The loss per unit of saved cost between two choices."""
    return (b.loss - a.loss) / (a.cost - b.cost)


def _append(hull: list[_Choice], choice: _Choice) -> None:
    """Add a cheaper choice to a lower convex hull; corners that it makes useless leave."""
    while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
        hull.pop()
    hull.append(choice)


def _hull(
    p: Projection, energy: torch.Tensor, storage: Storage, target: RankTarget, rounding: Rounding | None
) -> list[_Choice]:
    """The corners of a projection's lower convex hull of cost and loss in one storage, from dense to the cheapest.

    The loss per unit of saved cost rises from corner to corner.
    """

    def choice(rank: int | None, loss: float) -> _Choice:
        module = module_of(p, rank, storage)
        loss += 0.0 if rounding is None else rounding.loss(p, storage, rank)
        return _Choice({p.name: module}, size(p, rank, storage.form), target.cost(p, module), loss)

    step = rank_step(p, storage)
    tail = (0.5 * tail_energy(energy)).tolist()
    hull = [choice(None, 0.0)]
    for rank in range(len(energy) // step * step, 0, -step):
        if not saves(p, rank, storage.form):
            continue
        point = choice(rank, tail[rank])
        # Measured latencies need not fall with the rank, nor below the dense GEMM's.
        if point.cost < hull[-1].cost and pays(point.cost, hull[0].cost):
            _append(hull, point)
    return hull


def _sum(hulls: Sequence[list[_Choice]]) -> list[_Choice]:
    """The hull of choices that are made independently, whose costs and losses add up."""
    if len(hulls) == 1:
        return hulls[0]
    firsts = [hull[0] for hull in hulls]
    modules = {name: module for first in firsts for name, module in first.modules.items()}
    found = [_Choice(modules, *(sum(getattr(c, key) for c in firsts) for key in ("size", "cost", "loss")))]
    steps = sorted((pair for hull in hulls for pair in itertools.pairwise(hull)), key=lambda pair: _slope(*pair))
    for a, b in steps:
        last = found[-1]
        changes = (last.size + b.size - a.size, last.cost + b.cost - a.cost, last.loss + b.loss - a.loss)
        found.append(_Choice({**last.modules, **b.modules}, *changes))
    return found


def _union(hulls: Sequence[list[_Choice]]) -> list[_Choice]:
    """The hull of choices of which one is made."""
    if len(hulls) == 1:
        return hulls[0]
    hull: list[_Choice] = []
    for choice in sorted(itertools.chain.from_iterable(hulls), key=lambda c: (-c.cost, c.loss)):
        while hull and choice.loss <= hull[-1].loss:
            hull.pop()  # the cheaper one loses no more
        if not hull or choice.cost < hull[-1].cost:
            _append(hull, choice)
    return hull


def loss_front(
    projections: Sequence[Projection],
    energies: Mapping[str, torch.Tensor],
    target: RankTarget,
    ignored: Sequence[Projection] = (),
    rounding: Rounding | None = None,
) -> LossFront:
    """The Pareto front of size, or GEMM latency, and summed predicted loss of a model.

    Args:
        projections: to store.
        energies: projection -> twice the predicted loss of removing each direction, float64 [min(out, in)], descending;
            rank r loses half the sum of all elements from r on.
        target: with the storages, and what the front is of: parameters, latency or bytes.
        ignored: projections that stay as they are.
        rounding: what quantization costs; None if every projection has the same storage.

    Raises:
        InputError: the latency table lacks a shape.
    """
    groups: dict[str, list[Projection]] = {}
    for p in projections:
        groups.setdefault(p.name if rounding is None else rounding.leaders[p.name], []).append(p)
    # Losses add up: the model's hull takes the steps of all groups' hulls in the order of loss per saving.
    firsts: list[_Choice] = []
    steps: list[tuple[_Choice, _Choice]] = []
    for group in groups.values():
        # Where groups do not divide the inputs the dense weight would be in INT8, and its loss says nothing of factors.
        fitting = [s for s in target.storages if s.scheme is None or s.scheme.fits(group[0].in_features)]
        hulls = [
            _sum([_hull(p, energies[p.name], storage, target, rounding) for p in group])
            for storage in fitting or target.storages
        ]
        hull = _union(hulls)
        firsts.append(hull[0])
        steps += itertools.pairwise(hull)
    steps.sort(key=lambda step: _slope(*step))
    dense = sum(target.cost(p, PLAIN) for p in projections)
    total = dense + sum(target.cost(p, PLAIN) for p in ignored)
    elements = sum(p.numel for p in (*projections, *ignored))

    def sums(values: Iterable[float], first: float) -> list[float]:
        return list(itertools.accumulate(values, initial=first))

    saved = dense - sum(first.cost for first in firsts)
    removed = sum(p.numel for p in projections) - sum(first.size for first in firsts)
    return LossFront(
        {name: module for first in firsts for name, module in first.modules.items()},
        [b.modules for _, b in steps],
        [value / total for value in sums((a.cost - b.cost for a, b in steps), saved)],
        sums((b.loss - a.loss for a, b in steps), sum(first.loss for first in firsts)),
        [value / elements for value in sums((a.size - b.size for a, b in steps), removed)],
        "latency" if target.latencies is not None else "parameters" if target.itemsizes is None else "bytes",
    )
