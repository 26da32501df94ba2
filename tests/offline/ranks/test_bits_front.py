"""The front over ranks and bits: no other choice of the same bytes has a smaller predicted loss."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.quantization import INT8, int4
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.ranks.pareto import FACTORED, ROUNDED, LossFront, Rounding, check_size, loss_front
from pgsvd_vllm.offline.ranks.select import Spectra, choose_ranks
from pgsvd_vllm.offline.ranks.stored import PLAIN, bits_per_weight, module_of
from pgsvd_vllm.offline.ranks.target import Limit, RankTarget
from pgsvd_vllm.offline.settings import Storage

STORAGES = (Storage("pivot"), Storage("pivot", INT8), Storage("factors", int4(32)))
SIZES = dict.fromkeys(("q", "k", "down", "gate", "odd"), 2)
TARGET = RankTarget(0.5, None, STORAGES, itemsizes=SIZES)
# q and k have the same input; the gate has too few outputs to be quantized.
Q, K, DOWN, GATE = (
    Projection("q", 96, 64),
    Projection("k", 48, 64),
    Projection("down", 64, 96),
    Projection("gate", 8, 64),
)
ROUNDING = Rounding(
    {
        "q": {"int8": 0.001, "int4-32": 0.4},
        "k": {"int8": 0.002, "int4-32": 1.5},
        "down": {"int8": 0.001, "int4-32": 0.1},
    },
    {"q": "q", "k": "q", "down": "down", "gate": "gate"},
)


def spectra(projections: list[Projection]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(3)
    found = {}
    for p in projections:
        values = np.sort(rng.exponential(size=min(p.out_features, p.in_features)) ** 3)[::-1]
        found[p.name] = torch.from_numpy(values.copy())
    return found


def nbytes(p: Projection, rank: int | None, storage: Storage) -> int:
    """Bytes of a projection, counted by hand."""
    m, n, bits = p.out_features, p.in_features, None if storage.scheme is None else storage.scheme.num_bits

    def matrix(rows: int, columns: int) -> int:
        if bits is None or p is GATE:
            return 2 * rows * columns
        # Scales: one float32 per row, or one bfloat16 per group of 32.
        return rows * columns + 4 * rows if bits == 8 else rows * columns // 2 + 2 * rows * columns // 32

    if rank is None:
        return matrix(m, n)
    pivot = storage.form == "pivot"
    return matrix(rank, n) + matrix(m - rank if pivot else m, rank) + (4 * rank if pivot else 0)


def rounding_loss(p: Projection, storage: Storage, rank: int | None) -> float:
    key = None if storage.scheme is None or p is GATE else {8: "int8", 4: "int4-32"}[storage.scheme.num_bits]
    factor = ROUNDED * (1 if rank is None else FACTORED[storage.form])
    return 0.0 if key is None else factor * ROUNDING.losses[p.name][key]


def modules_at(front: LossFront, corner: int) -> dict[str, FactoredModule]:
    found = dict(front.start)
    for step in front.steps[:corner]:
        found.update(step)
    return found


def ranks_of(p: Projection, storage: Storage) -> list[int | None]:
    """The ranks that save a tenth of the dense weight in the same scheme."""
    step = 32 if storage.scheme is not None and storage.scheme.num_bits == 4 else 1
    most = min(p.out_features - 1, p.in_features) if storage.form == "pivot" else min(p.out_features, p.in_features)
    dense = nbytes(p, None, storage)
    return [None, *(r for r in range(step, most + 1, step) if nbytes(p, r, storage) <= 0.9 * dense)]


def test_the_bytes_of_a_module_are_those_of_its_tensors() -> None:
    for p, storage in itertools.product((Q, K, DOWN, GATE), STORAGES):
        for rank in ranks_of(p, storage):
            module = module_of(p, rank, storage)
            assert module.nbytes(p.out_features, p.in_features, 2) == nbytes(p, rank, storage)
            widths = {"I8": 1, "I32": 4, "F32": 4, "BF16": 2}
            total = 0
            for suffix, shape in module.stored_shapes(p.out_features, p.in_features).items():
                scheme = module.schemes.get(suffix.removesuffix("_packed").removesuffix("_scale"))
                width = 4 if suffix == "pivots" else 2
                if scheme is not None:
                    width = widths[scheme.dtype if suffix.endswith("_packed") else scheme.scale_dtype]
                total += width * math.prod(shape)
            assert total == nbytes(p, rank, storage)


def test_no_other_choice_lies_below_the_front() -> None:
    projections = [Q, K, DOWN, GATE]
    energies = spectra(projections)
    front = loss_front(projections, energies, TARGET, rounding=ROUNDING)
    assert front.unit == "bytes"
    total = sum(2 * p.numel for p in projections)

    def loss(p: Projection, rank: int | None, storage: Storage) -> float:
        return rounding_loss(p, storage, rank) + (0.0 if rank is None else 0.5 * float(energies[p.name][rank:].sum()))

    def points(group: list[Projection]) -> list[tuple[int, float]]:
        """Bytes and loss of every choice of one storage for a group and ranks for its members."""
        found = []
        for storage in STORAGES:
            each = [[(nbytes(p, r, storage), loss(p, r, storage)) for r in ranks_of(p, storage)] for p in group]
            found += [(sum(c for c, _ in row), sum(x for _, x in row)) for row in itertools.product(*each)]
        return found

    groups = [points(group) for group in ([Q, K], [DOWN], [GATE])]
    # The lower hull of a sum touches every line of a slope where each group does.
    corners = list(zip((total * (1 - r) for r in front.removed), front.losses, strict=True))
    for slope in np.geomspace(1e-7, 1e-2, 200):
        best = sum(min(x + slope * cost for cost, x in group) for group in groups)
        assert min(x + slope * cost for cost, x in corners) == pytest.approx(best, rel=1e-9)
    for i, (cost, predicted) in enumerate(corners):
        modules = modules_at(front, i)
        assert sum(modules[p.name].nbytes(p.out_features, p.in_features, 2) for p in projections) == pytest.approx(cost)
        schemes = {p.name: {s.key for s in modules[p.name].schemes.values()} for p in projections}
        assert schemes["q"] == schemes["k"]
        assert schemes["gate"] == set()
        paid = sum(
            loss(p, modules[p.name].rank or None, next(s for s in STORAGES if s.scheme in own))
            for p in projections
            for own in [list(modules[p.name].schemes.values())[:1] or [None]]
        )
        assert predicted == pytest.approx(paid)
    slopes = [(b[1] - a[1]) / (a[0] - b[0]) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes)
    used = {
        tuple(s.key for s in m.schemes.values())[:1] for i in range(len(corners)) for m in modules_at(front, i).values()
    }
    assert used == {(), ("int8",), ("int4-32",)}


def test_a_size_is_never_exceeded() -> None:
    projections = [Q, K, DOWN, GATE]
    found = Spectra({}, spectra(projections), ROUNDING)
    for ratio in (0.05, 0.3, 0.55, 0.7, 0.8):
        limit = Limit("target_bytes", 1000 * (1 - ratio) + 500, 1500, 1000, "bytes")
        assert limit.share == pytest.approx(ratio)
        target = replace(TARGET, ratio=limit.share, limit=limit)
        modules = choose_ranks(ProjectionSet([projections]), found, target).modules
        assert bits_per_weight(projections, modules, SIZES) <= 16 * (1 - limit.share)
        check_size(ProjectionSet([projections]), target)
    small = replace(TARGET, ratio=0.999, limit=Limit("target_bytes", 5e5 + 1e3, 1.5e6, 1e6, "bytes"))
    for check in (
        lambda: choose_ranks(ProjectionSet([projections]), found, small),
        lambda: check_size(ProjectionSet([projections]), small),
    ):
        with pytest.raises(ChoiceError, match=r"`target_bytes` .*: the least that this model can have is .*; raise it"):
            check()
    with pytest.raises(ChoiceError, match=r"`ratio` 0\.999: more than this model can give"):
        check_size(ProjectionSet([projections]), replace(TARGET, ratio=0.999))


def test_a_size_that_bits_alone_reach_needs_no_ranks() -> None:
    limit = Limit("target_bytes", 60, 100, 100, "bytes")
    target = RankTarget(limit.share, None, (Storage("pivot", INT8),), itemsizes=SIZES, limit=limit)
    allocation = choose_ranks(ProjectionSet([[Q, DOWN]]), Spectra({}, spectra([Q, DOWN])), target)
    assert allocation.ranks == {}
    assert {name: module.schemes for name, module in allocation.modules.items()} == {
        "q": {"weight": INT8},
        "down": {"weight": INT8},
    }
    assert allocation.removed == 0


def test_a_projection_whose_inputs_are_no_groups_has_no_group_scheme() -> None:
    """Its dense weight would be in INT8, which says nothing of the loss of a 4-bit up factor."""
    odd = Projection("odd", 128, 72)
    rounding = Rounding({"odd": {"int8": 0.001}}, {"odd": "odd"})
    front = loss_front([odd], spectra([odd]), TARGET, rounding=rounding)
    keys = {s.key for i in range(len(front.removed)) for s in modules_at(front, i)["odd"].schemes.values()}
    assert keys == {"int8"}


def test_the_removed_share_counts_factors_without_loss() -> None:
    silent = {"q": torch.zeros(64, dtype=torch.float64), "down": spectra([DOWN])["down"]}
    losses = {"q": {"int8": 0.0, "int4-32": 0.0}, "down": ROUNDING.losses["down"]}
    front = loss_front([Q, DOWN], silent, TARGET, rounding=Rounding(losses, {"q": "q", "down": "down"}))
    rank = front.start["q"].rank
    assert rank == 1
    size = rank * 64 + (96 - rank) * rank + rank
    assert front.parameters[0] == pytest.approx((Q.numel - size) / (Q.numel + DOWN.numel))


def test_ignored_projections_keep_their_bytes() -> None:
    front = loss_front([DOWN], spectra([DOWN]), TARGET, ignored=[Q], rounding=ROUNDING)
    assert front.removed[0] == 0
    assert front.removed[-1] < DOWN.numel / (DOWN.numel + Q.numel)


def test_a_loss_gives_the_smallest_model_within_it() -> None:
    projections = [Q, K, DOWN, GATE]
    front = loss_front(projections, spectra(projections), TARGET, rounding=ROUNDING)
    for corner in range(1, len(front.steps) + 1):
        above = front.losses[corner + 1] if corner < len(front.steps) else 2 * front.losses[corner]
        for loss in (front.losses[corner], (front.losses[corner] + above) / 2):
            found = front.within(loss)
            assert found.loss == front.losses[corner]
            kept = {name: module for name, module in modules_at(front, corner).items() if module != PLAIN}
            assert found.modules == kept
    with pytest.raises(ChoiceError, match="`target_loss` 1e-09: too small"):
        front.within(1e-9)
