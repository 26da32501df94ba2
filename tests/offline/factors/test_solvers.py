"""The solvers against numpy: every error is recomputed from W, X and the factors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.offline.factors.solvers import ALS_TOLERANCE, als, closed_form, relative_error
from pgsvd_vllm.offline.factors.stored_form import PIVOT_GROWTH, choose_pivots, stored_form

EPS = float(np.finfo(np.float64).eps)
# Squared relative errors near EPS are rounding errors; als stops below their root.
FLOOR = 1e-7

SHAPES = [(23, 41), (41, 23), (29, 29), (7, 64), (64, 7)]
KINDS = ["plain", "sink", "few-tokens", "aligned"]


def problem(kind: str, m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [m, n] and inputs X [n, tokens]."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, n))
    if kind == "plain":
        return w, rng.standard_normal((n, 4 * n))
    if kind == "sink":
        # One direction has nearly all the energy; the Gram matrix has condition number 1e8.
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        values = np.concatenate([[1e4], np.geomspace(30, 1, n - 1)])
        right = np.linalg.qr(rng.standard_normal((2 * n, n)))[0]
        return w, q @ np.diag(values) @ right.T
    if kind == "few-tokens":
        return w, rng.standard_normal((n, max(2, n // 3)))
    # W and X share their axes in reverse order: the SVD of W is a saddle point of an alternating solver.
    size = min(m, n)
    w = np.zeros((m, n))
    w[range(size), range(size)] = np.geomspace(4, 1, size)
    return w, np.diag(np.geomspace(1, 1e3, n))


def gram(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x @ x.T)


def error_of(w: np.ndarray, x: np.ndarray, u: torch.Tensor, v: torch.Tensor) -> float:
    approximation = u.double().numpy() @ v.double().numpy()
    return float(np.linalg.norm((w - approximation) @ x) / np.linalg.norm(w @ x))


def optimum_of(w: np.ndarray, x: np.ndarray, rank: int) -> float:
    """The smallest error by Eckart-Young on the outputs W X, without a Gram matrix."""
    s = np.linalg.svd(w @ x, compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def ranks_of(m: int, n: int) -> list[int]:
    return sorted({1, min(m, n) // 2, min(m, n) - 1, min(m, n)})


def rounding(w: np.ndarray) -> float:
    """Bound on the rounding error of a squared relative error: two GEMMs and a trace."""
    return 4 * sum(w.shape) * EPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_als_error_never_rises_and_is_exact(kind: str, m: int, n: int) -> None:
    w, x = problem(kind, m, n)
    for rank in ranks_of(m, n):
        # With optimum 0 and tolerance 0 only the exact solution stops it early.
        factors = als(torch.from_numpy(w), gram(x), rank, optimum=0.0, tolerance=0.0, max_sweeps=25)
        squares = np.square(factors.errors)
        assert np.all(np.diff(squares) <= rounding(w)), (rank, factors.errors)
        assert factors.errors[-1] <= FLOOR or len(factors.errors) == 26
        true = error_of(w, x, factors.u, factors.v)
        assert true**2 == pytest.approx(squares[-1], rel=1e-6, abs=10 * rounding(w))


@pytest.mark.parametrize("tolerance", [ALS_TOLERANCE, 0.001])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_als_stops_by_its_rule_near_the_optimum(kind: str, m: int, n: int, tolerance: float) -> None:
    w, x = problem(kind, m, n)
    for rank in ranks_of(m, n):
        optimum = optimum_of(w, x, rank)
        factors = als(torch.from_numpy(w), gram(x), rank, optimum, tolerance=tolerance)
        limit = max(optimum * (1 + tolerance), FLOOR)
        assert factors.errors[-1] <= limit, (rank, optimum, factors.errors[-3:])
        assert all(error > limit for error in factors.errors[:-1]), "it continued after the rule was met"
        assert error_of(w, x, factors.u, factors.v) <= limit + np.sqrt(rounding(w))
        assert factors.u.shape == (m, rank)
        assert factors.v.shape == (rank, n)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(2, 33),
    n=st.integers(2, 33),
    tokens=st.integers(1, 70),
    part=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_als_reaches_the_optimum_for_any_shape(m: int, n: int, tokens: int, part: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((m, n)), rng.standard_normal((n, tokens))
    rank = max(1, round(part * min(m, n)))
    optimum = optimum_of(w, x, rank)
    factors = als(torch.from_numpy(w), gram(x), rank, optimum)
    assert error_of(w, x, factors.u, factors.v) <= max(optimum * (1 + ALS_TOLERANCE), FLOOR) + np.sqrt(rounding(w))


@pytest.mark.parametrize("what", ["inputs", "weight"])
@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5)])
def test_als_of_zero_inputs_or_weights_is_finite(what: str, m: int, n: int) -> None:
    w, x = problem("plain", m, n)
    w, x = (w, 0 * x) if what == "inputs" else (0 * w, x)
    factors = als(torch.from_numpy(w), gram(x), 3, optimum=0.0)
    assert factors.errors == [0.0]
    assert factors.u.shape == (m, 3)
    assert factors.v.shape == (3, n)
    assert torch.isfinite(factors.u).all()
    assert torch.isfinite(factors.v).all()
    for form in ("factors", "pivot"):
        for tensor in stored_form(factors, torch.from_numpy(w), gram(x), form, torch.bfloat16).values():
            assert torch.isfinite(tensor).all()


def test_als_u_is_orthonormal() -> None:
    w, x = problem("sink", 31, 17)
    u = als(torch.from_numpy(w), gram(x), 6, optimum_of(w, x, 6)).u.numpy()
    assert np.abs(u.T @ u - np.eye(6)).max() <= 31 * 6 * EPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_closed_form_beats_every_other_solution(kind: str, m: int, n: int) -> None:
    w, x = problem(kind, m, n)
    rng = np.random.default_rng(1)
    for rank in ranks_of(m, n)[:3]:
        best = closed_form(torch.from_numpy(w), gram(x), rank)
        error = error_of(w, x, best.u, best.v)
        slack = rounding(w)
        assert error**2 == pytest.approx(optimum_of(w, x, rank) ** 2, rel=1e-6, abs=slack * 10)
        assert error**2 == pytest.approx(best.errors[-1] ** 2, rel=1e-6, abs=slack * 10)
        left, s, right = np.linalg.svd(w, full_matrices=False)
        candidates = [(left[:, :rank] * s[:rank], right[:rank])]
        for i in range(50):
            if i % 2:
                # The best V for a random U, which is closer than two random factors.
                u = np.linalg.qr(rng.standard_normal((m, rank)))[0]
                candidates.append((u, u.T @ w))
            else:
                noise = 10.0 ** rng.uniform(-6, 0)
                candidates.append(
                    (
                        best.u.numpy() + noise * rng.standard_normal((m, rank)),
                        best.v.numpy() + noise * rng.standard_normal((rank, n)),
                    )
                )
        for u, v in candidates:
            assert error**2 <= error_of(w, x, torch.from_numpy(u), torch.from_numpy(v)) ** 2 + 10 * slack


def test_errors_are_invariant_to_rotations_of_the_inputs() -> None:
    m, n, rank = 19, 27, 5
    w, x = problem("sink", m, n)
    rng = np.random.default_rng(2)
    tokens = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0]
    channels = np.linalg.qr(rng.standard_normal((n, n)))[0]
    exact = optimum_of(w, x, rank)
    variants = [(w, x), (w, x @ tokens), (w @ channels.T, channels @ x)]
    for solve in (closed_form, lambda *a: als(*a, optimum=exact)):
        errors = [solve(torch.from_numpy(a), gram(b), rank).errors[0] for a, b in variants]
        # Gram entries have rounding errors of EPS times the largest direction: e^2 changes by n EPS.
        assert np.square(errors) == pytest.approx(np.full(3, errors[0] ** 2), abs=10 * n * n * EPS)


def test_relative_error_matches_the_definition() -> None:
    w, x = problem("plain", 13, 21)
    rng = np.random.default_rng(3)
    u, v = torch.from_numpy(rng.standard_normal((13, 4))), torch.from_numpy(rng.standard_normal((4, 21)))
    assert relative_error(torch.from_numpy(w), gram(x), u @ v) == pytest.approx(error_of(w, x, u, v), rel=1e-12)
    assert relative_error(torch.from_numpy(w), 0 * gram(x), u @ v) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(65, 130), (130, 65)])
def test_refit_repairs_rounding(m: int, n: int, dtype: torch.dtype) -> None:
    # A weight of nearly low rank, so that most of the error is rounding.
    rng = np.random.default_rng(4)
    w = rng.standard_normal((m, 16)) @ rng.standard_normal((16, n)) + 1e-4 * rng.standard_normal((m, n))
    x = problem("plain", m, n)[1]
    weight = torch.from_numpy(w)
    factors = closed_form(weight, gram(x), 16)
    stored = stored_form(factors, weight, gram(x), "factors", dtype)
    u, v = stored["weight_u"], stored["weight_v"]
    assert u.dtype == v.dtype == dtype
    assert u.is_contiguous()
    assert v.is_contiguous()
    naive = error_of(w, x, factors.u.to(dtype), factors.v.to(dtype))
    assert factors.errors[-1] < error_of(w, x, u, v) < naive
    # V is the rounded least-squares solution for the rounded U, exact to half a unit in the last place.
    exact = np.linalg.lstsq(u.double().numpy(), w, rcond=None)[0]
    ulp = torch.finfo(dtype).eps / 2 * np.abs(exact) + torch.finfo(dtype).smallest_normal
    assert np.all(np.abs(v.double().numpy() - exact) <= ulp * (1 + 1e-6))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pivot_form_equals_the_factors(kind: str, m: int, n: int) -> None:
    """In float64 the pivot form is the same matrix as U V, with bounded coefficients."""
    w, x = problem(kind, m, n)
    weight = torch.from_numpy(w)
    for rank in ranks_of(m, n):
        if rank == m:
            continue
        factors = closed_form(weight, gram(x), rank)
        pivots, c = choose_pivots(factors.u)
        assert c.abs().max() <= PIVOT_GROWTH * (1 + 1e-9)
        matrix = factors.u @ factors.v
        tensors = {"weight_p": matrix[pivots], "weight_c": c, "pivots": pivots.int()}
        torch.testing.assert_close(reconstruct(tensors), matrix, atol=1e-10 * float(matrix.abs().max()), rtol=0)
        stored = stored_form(factors, weight, gram(x), "pivot", torch.float64)
        assert stored["pivots"].tolist() == pivots.tolist()
        # The refit may change the matrix, but not to a larger error.
        assert relative_error(weight, gram(x), reconstruct(stored)) <= relative_error(weight, gram(x), matrix) + FLOOR


@pytest.mark.parametrize("with_metric", [False, True])
def test_the_refit_of_the_pivot_form_repairs_rounding(with_metric: bool) -> None:
    w, x = problem("plain", 40, 56)
    weight, c = torch.from_numpy(w), gram(x)
    rng = np.random.default_rng(5)
    metric = torch.linalg.cholesky(torch.from_numpy(np.cov(rng.standard_normal((40, 400))))) if with_metric else None

    def loss(matrix: torch.Tensor) -> float:
        change = weight - matrix
        if metric is not None:
            change = metric.T @ change
        return float(torch.trace(change @ c @ change.T))

    factors = closed_form(weight, c, 16, metric)
    pivots, coefficients = choose_pivots(factors.u)
    naive = {
        "weight_p": (factors.u[pivots] @ factors.v).bfloat16(),
        "weight_c": coefficients.bfloat16(),
        "pivots": pivots.int(),
    }
    stored = stored_form(factors, weight, c, "pivot", torch.bfloat16, metric)
    best = loss(factors.u @ factors.v)
    assert best <= loss(reconstruct(stored)) <= loss(reconstruct(naive))
