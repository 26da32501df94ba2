"""Rank allocation on synthetic models; all sums are recomputed from the ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.quantization import int4
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.stored import RANK_MULTIPLE, ROUND_FROM, hardware_rank
from pgsvd_vllm.offline.ranks.uniform import at_ratio, at_tolerance
from pgsvd_vllm.offline.settings import Storage

SHAPES = [(256, 512), (512, 512), (300, 260), (1024, 256), (272, 700)]


def model(count: int = 60) -> tuple[list[Projection], dict[str, torch.Tensor]]:
    """Projections whose spectra decay at very different rates."""
    projections, profiles = [], {}
    for i in range(count):
        out, width = SHAPES[i % len(SHAPES)]
        p = Projection(f"layers.{i}.proj", out, width)
        size = min(out, width)
        speed = 0.3 + 8 * (i * 7 % count) / count
        energy = torch.exp(-speed * torch.arange(size, dtype=torch.float64) / size) + 1e-4
        projections.append(p)
        profiles[p.name] = error_profile(energy)
    return projections, profiles


def removed(projections: list[Projection], ranks: dict[str, int]) -> float:
    kept = total = 0
    for p in projections:
        dense = p.out_features * p.in_features
        rank = ranks.get(p.name)
        kept += dense if rank is None else rank * p.out_features + rank * p.in_features
        total += dense
    return 1 - kept / total


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.2, 0.25, 0.333, 0.5, 0.7, 0.85])
def test_ratio_is_met_within_half_a_point(ratio: float) -> None:
    projections, profiles = model()
    allocation = at_ratio(projections, profiles, ratio)
    assert abs(removed(projections, allocation.ranks) - ratio) <= 0.005
    assert allocation.removed == pytest.approx(removed(projections, allocation.ranks), abs=1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(ratio=st.floats(0.005, 0.9))
def test_any_ratio_is_met(ratio: float) -> None:
    projections, profiles = model()
    assert abs(removed(projections, at_ratio(projections, profiles, ratio).ranks) - ratio) <= 0.005


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.55, 0.8, 0.99])
def test_each_rank_is_the_smallest_within_the_tolerance(tolerance: float) -> None:
    projections, profiles = model()
    allocation = at_tolerance(projections, profiles, tolerance)
    for p in projections:
        profile = profiles[p.name].tolist()
        smallest = max(1, next(r for r, error in enumerate(profile) if error <= tolerance))
        rank = math.ceil(smallest / 16) * 16
        saves = rank * (p.out_features + p.in_features) < p.out_features * p.in_features
        assert allocation.ranks.get(p.name) == (rank if saves else None)
        if saves:
            assert profile[rank] <= tolerance


def test_ranks_never_rise_with_the_tolerance() -> None:
    projections, profiles = model()
    tolerances = [i / 40 for i in range(1, 40)]
    allocations = [at_tolerance(projections, profiles, t) for t in tolerances]
    for p in projections:
        # A dense projection counts as the largest rank.
        ranks = [a.ranks.get(p.name, 10**9) for a in allocations]
        assert ranks == sorted(ranks, reverse=True)
    assert [a.removed for a in allocations] == sorted(a.removed for a in allocations)
    assert allocations[0].removed < allocations[-1].removed


def test_projections_stay_dense_if_factors_are_not_smaller() -> None:
    # At half the full rank the factors of a square matrix have as many elements as the matrix.
    square = Projection("square", 40, 40)
    profile = error_profile(torch.ones(40, dtype=torch.float64))
    at_half, below_half = profile[20].item(), profile[19].item()
    assert at_tolerance([square], {"square": profile}, at_half).ranks == {}
    assert at_tolerance([square], {"square": profile}, at_half).removed == 0
    assert at_tolerance([square], {"square": profile}, below_half).ranks == {"square": 19}


@pytest.mark.parametrize(
    ("out", "width", "rank", "expected"),
    [(256, 256, 1, 16), (256, 256, 16, 16), (256, 4096, 17, 32), (255, 4096, 17, 17), (4096, 255, 3, 3)],
)
def test_ranks_are_rounded_up_where_both_sides_are_large(out: int, width: int, rank: int, expected: int) -> None:
    assert (RANK_MULTIPLE, ROUND_FROM) == (16, 256)
    assert hardware_rank(Projection("p", out, width), rank, Storage("factors")) == expected


@pytest.mark.parametrize(
    ("side", "group", "rank", "expected"),
    [(64, 32, 1, 32), (512, 32, 33, 64), (512, 128, 33, 128), (1024, 32, 33, 128)],
)
def test_ranks_of_quantized_factors_consist_of_groups(side: int, group: int, rank: int, expected: int) -> None:
    assert hardware_rank(Projection("p", side, side), rank, Storage("factors", int4(group))) == expected


@pytest.mark.parametrize("ratio", [0.97, 0.999])
def test_a_ratio_beyond_rank_one_is_refused(ratio: float) -> None:
    projections, profiles = model()
    with pytest.raises(InputError, match=rf"`ratio` {ratio}.*remove \d\d\.\d%"):
        at_ratio(projections, profiles, ratio)


def test_a_ratio_below_the_first_step_is_refused() -> None:
    # The largest rank that saves elements of an 8 x 8 matrix is 3, which removes a quarter.
    p = Projection("p", 8, 8)
    with pytest.raises(InputError, match=r"`ratio` 0\.05: too small .* 25\.0%"):
        at_ratio([p], {"p": error_profile(torch.ones(8, dtype=torch.float64))}, 0.05)
