"""Error profiles against the errors of optimal low-rank approximations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgsvd_vllm.offline.linalg import gram_root, output_energy
from pgsvd_vllm.offline.ranks.error_profile import error_profile, rank_for

EPS = float(np.finfo(np.float64).eps)


def inputs(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "few-tokens":
        return rng.standard_normal((n, n // 2))
    x = rng.standard_normal((n, 3 * n))
    if kind == "sink":
        x[:, 0] *= 1e4
    return x


@pytest.mark.parametrize("kind", ["plain", "sink", "few-tokens"])
@pytest.mark.parametrize(("m", "n"), [(17, 31), (31, 17), (22, 22), (1, 9), (9, 1)])
def test_profile_equals_the_best_approximation_error(m: int, n: int, kind: str) -> None:
    if kind == "few-tokens" and n == 1:
        kind = "plain"
    w, x = np.random.default_rng(5).standard_normal((m, n)), inputs(kind, n)
    profile = error_profile(output_energy(torch.from_numpy(w), torch.from_numpy(x @ x.T)))
    assert profile.dtype == torch.float64
    assert len(profile) == min(m, n) + 1
    assert profile[0] == 1
    left = np.linalg.svd(w @ x, full_matrices=False)[0]
    total = np.linalg.norm(w @ x) ** 2
    for rank, error in enumerate(profile.tolist()):
        u = left[:, :rank]
        best = u @ (u.T @ w)
        true = np.linalg.norm((w - best) @ x) ** 2 / total
        # Every eigenvalue has an error of at most ~n EPS of the largest one, and up to n of them are summed.
        assert error**2 == pytest.approx(true, rel=1e-9, abs=4 * (m + n) ** 2 * EPS), rank


def test_profile_never_rises_and_ends_at_zero() -> None:
    energy = torch.tensor([9.0, 3.0, 3.0, 1e-12, 0.0], dtype=torch.float64)
    profile = error_profile(energy)
    assert (profile.diff() <= 0).all()
    assert profile[-1] == 0
    assert profile[1].item() == pytest.approx((6 / 15) ** 0.5, rel=1e-12)


def test_profile_of_zero_inputs() -> None:
    profile = error_profile(output_energy(torch.randn(4, 6), torch.zeros(6, 6)))
    assert profile.tolist() == [1, 0, 0, 0, 0]
    assert rank_for(profile, 0.5) == 1


@pytest.mark.parametrize("kind", ["plain", "sink", "few-tokens"])
def test_root_squared_is_the_gram_matrix(kind: str) -> None:
    x = inputs(kind, 25)
    root = gram_root(torch.from_numpy(x @ x.T)).numpy()
    assert np.abs(root @ root.T - x @ x.T).max() <= 25 * 25 * EPS * np.linalg.norm(x, 2) ** 2


def test_a_shared_root_changes_nothing() -> None:
    x = torch.from_numpy(inputs("plain", 12))
    w, gram = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), x @ x.T
    assert torch.equal(output_energy(w, gram), output_energy(w, gram, gram_root(gram)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    energy=st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    tolerance=st.one_of(st.floats(0, 1), st.integers(0, 20)),
)
def test_rank_is_the_smallest_that_meets_the_tolerance(energy: list[float], tolerance: float) -> None:
    profile = error_profile(torch.tensor(sorted(energy, reverse=True), dtype=torch.float64))
    if isinstance(tolerance, int):
        # A tolerance that equals an element of the profile exactly.
        tolerance = profile[min(tolerance, len(energy))].item()
    expected = next(r for r in range(1, len(profile)) if profile[r].item() <= tolerance or r == len(profile) - 1)
    assert rank_for(profile, tolerance) == expected
