"""Solvers for the factors: minimise ||(W - U V) X||_F over U [m, r], V [r, n].

Everything is expressed through the Gram matrix C = sum x x^T, in float64.
"""

from dataclasses import dataclass

import torch

from pgsvd_vllm.kernels.reference import other_rows, pivot_weight
from pgsvd_vllm.offline.spectrum import gram_root

# ALS stops once its error is certified to lie this close to the optimum, relative.
ALS_TOLERANCE = 0.005
ALS_MAX_SWEEPS = 200
# Pivot rows are exchanged until no other row is this many times as large in any of its coordinates.
PIVOT_GROWTH = 2.0


@dataclass(frozen=True)
class Factors:
    """U [m, r], V [r, n], and the relative error after every sweep."""

    u: torch.Tensor
    v: torch.Tensor
    errors: list[float]


def relative_error(weight: torch.Tensor, gram: torch.Tensor, approximation: torch.Tensor) -> float:
    """||(W - W_r) X||_F / ||W X||_F; 0 where W X vanishes."""
    w, c = weight.double(), gram.double()
    residual = w - approximation.double()
    total = (w @ c).mul_(w).sum()
    if total <= 0:
        return 0.0
    return float(((residual @ c).mul_(residual).sum().clamp_min(0) / total).sqrt())


def closed_form(weight: torch.Tensor, gram: torch.Tensor, rank: int, metric: torch.Tensor | None = None) -> Factors:
    """The exact optimum of ||L^T (W - U V) X||_F: with W' = L^T W, U' holds the leading
    eigenvectors of W' C W'^T, U = L^-T U' and V = U'^T W'.

    Args:
        weight: [m, n].
        gram: [n, n].
        rank: r <= min(m, n).
        metric: L [m, m], lower triangular; the identity if None.

    Returns:
        factors, U with columns of norm 1; `errors` has the relative error without the metric.
    """
    w, c = weight.double(), gram.double()
    target = w if metric is None else metric.T @ w
    if target.shape[0] <= target.shape[1]:
        u = torch.linalg.eigh(target @ c @ target.T).eigenvectors[:, -rank:].flip(1)
    else:
        half = target @ gram_root(c)
        u = torch.linalg.qr(half @ torch.linalg.eigh(half.T @ half).eigenvectors[:, -rank:].flip(1)).Q
    v = u.T @ target
    if metric is not None:
        u = torch.linalg.solve_triangular(metric.T, u, upper=True)
        norms = u.norm(dim=0)
        u, v = u / norms, v * norms[:, None]
    return Factors(u, v, [relative_error(w, c, u @ v)])


def als(
    weight: torch.Tensor,
    gram: torch.Tensor,
    rank: int,
    optimum: float,
    tolerance: float = ALS_TOLERANCE,
    max_sweeps: int = ALS_MAX_SWEEPS,
) -> Factors:
    """Alternating least squares (PGSVD, arXiv 2510.05544, algorithm 1) from a plain SVD start.

    One sweep solves for V given U, then for U given V:
        V = (U^T U)^-1 U^T W,   U = W C V^T (V C V^T)^-1,
    and re-orthonormalises U, which changes no product. Each step is an exact minimisation, so the
    error never rises. The sweeps end when the error is within `tolerance` of the optimum, which
    the error profile gives: a certificate rather than a guess from the last decrease.

    Args:
        weight: [m, n].
        gram: [n, n].
        rank: r <= min(m, n).
        optimum: the best relative error at this rank, e(r) of the profile.
        tolerance: allowed relative excess over the optimum.
        max_sweeps: bound on the sweeps.

    Returns:
        factors; `errors` has the start's error, then one entry a sweep.
    """
    w, c = weight.double(), gram.double()
    m, n = w.shape
    wc = w @ c
    total = (wc * w).sum()
    if total <= 0:
        return Factors(torch.eye(m, rank, dtype=w.dtype, device=w.device), w[:rank].clone(), [0.0])
    cross = wc @ w.T if m <= n else None
    # Where W and C share axes the SVD start is a saddle that no sweep leaves: step aside a little.
    aside = torch.randn(m, rank, dtype=w.dtype, generator=torch.Generator().manual_seed(0)).to(w.device)
    u = torch.linalg.qr(_leading_left_vectors(w, rank) + 1e-3 / m**0.5 * aside).Q
    errors: list[float] = []
    while True:
        # W C V^T with V = U^T W. Its column span is that of the least-squares U.
        product = cross @ u if cross is not None else wc @ (w.T @ u)
        captured = (u * product).sum()
        errors.append(float(((total - captured) / total).clamp_min(0).sqrt()))
        # Below 1e-7 of the output the float64 sums above carry no more digits.
        done = errors[-1] <= max(optimum * (1 + tolerance), 1e-7)
        if done or len(errors) > max_sweeps:
            return Factors(u, u.T @ w, errors)
        u = torch.linalg.qr(product).Q


def _leading_left_vectors(w: torch.Tensor, rank: int) -> torch.Tensor:
    """The first left singular vectors of w, through the smaller of its two Gram matrices."""
    if w.shape[0] <= w.shape[1]:
        return torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:]
    return torch.linalg.qr(w @ torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank:]).Q


def stored_form(
    factors: Factors,
    weight: torch.Tensor,
    gram: torch.Tensor,
    form: str,
    dtype: torch.dtype,
    metric: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a form (see `checkpoint.FORMS`) in the dtype to be stored.

    The part that is rounded first is kept, and the other is refitted to it in the same norm.

    Args:
        factors: U and V in float64.
        weight: the target [m, n].
        gram: [n, n].
        form: `factors` or `pivot`.
        metric: L [m, m] of the norm ||L^T (W - U V) X||; the identity if None.
    """
    if form == "factors":
        u, v = _round_factors(factors, weight, dtype, metric)
        return {"weight_v": v, "weight_u": u}
    p, c, pivots = _round_pivots(factors, weight, gram, dtype, metric)
    return {"weight_p": p, "weight_c": c, "pivots": pivots}


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix [m, n] that the tensors of a form stand for, float64."""
    if "pivots" in tensors:
        return pivot_weight(tensors["weight_p"].double(), tensors["weight_c"].double(), tensors["pivots"])
    return tensors["weight_u"].double() @ tensors["weight_v"].double()


def _round_factors(
    factors: Factors, weight: torch.Tensor, dtype: torch.dtype, metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, r] and V [r, n] in `dtype`, V refitted to the rounded U.

    The best V for a given U is the least-squares solution of L^T U V = L^T W whatever the inputs
    are, so the refit repairs U's rounding for free.
    """
    u = factors.u.to(dtype)
    exact, target = u.double(), weight.double()
    if metric is not None:
        exact, target = metric.T @ exact, metric.T @ target
    v = torch.linalg.solve(exact.T @ exact, exact.T @ target)
    return u.contiguous(), v.to(dtype).contiguous()


def _round_pivots(
    factors: Factors, weight: torch.Tensor, gram: torch.Tensor, dtype: torch.dtype, metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [r, n] and C [m - r, r] in `dtype` and the pivots int32 [r], C refitted to the rounded P.

    With G = L L^T, D = W - U V for the rounded P and the old C, and o the rows that are no pivots,
    the error is least at C + G_oo^-1 (G D X X^T P^T)_o (P X X^T P^T)^-1.
    """
    pivots, c = choose_pivots(factors.u)
    others = other_rows(pivots, len(factors.u))
    p = (factors.u[pivots] @ factors.v).to(dtype)
    exact = p.double()
    gram = gram.double()
    seen = gram @ exact.T
    inner = exact @ seen
    # Directions of P that the inputs hardly show keep the old C.
    inner.diagonal().add_(1e-8 * inner.diagonal().mean() + torch.finfo(torch.float64).tiny)
    residual = weight.double()[others] - c @ exact
    if metric is None:
        gradient = residual @ seen
    else:
        whole = torch.empty_like(weight, dtype=torch.float64)
        whole[others], whole[pivots] = residual, weight.double()[pivots] - exact
        rows = metric[others]
        gradient = torch.cholesky_solve(rows @ (metric.T @ (whole @ seen)), torch.linalg.cholesky(rows @ rows.T))
    c = c + torch.cholesky_solve(gradient.T, torch.linalg.cholesky(inner)).T
    return p.contiguous(), c.to(dtype).contiguous(), pivots.int()


def choose_pivots(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of U [m, r] that span the others with small coefficients.

    Gaussian elimination with row exchanges gives a start; then single rows are exchanged until no
    coefficient exceeds PIVOT_GROWTH (the maximum-volume rule), so that rounding P is not amplified.

    Returns:
        (pivots int64 [r] ascending, C [m - r, r] with U[others] = C U[pivots]).
    """
    m, r = u.shape
    _, swaps = torch.linalg.lu_factor(u)
    rows = list(range(m))
    for i, j in enumerate(swaps.tolist()):  # counted from 1
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    order = torch.tensor(rows, device=u.device)
    pivots, others = order[:r].clone(), order[r:].clone()
    c = torch.linalg.solve(u[pivots], u[others], left=False)
    for _ in range(4 * r):
        place = int(c.abs().argmax())
        i, j = divmod(place, r)
        if c[i, j].abs() <= PIVOT_GROWTH:
            break
        # Row others[i] takes the place of pivots[j].
        row, column, corner = c[i].clone(), c[:, j].clone(), c[i, j].clone()
        row[j] -= 1
        column[i] += 1
        c -= torch.outer(column, row) / corner
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
    pivots = pivots.sort().values
    others = other_rows(pivots, m)
    # Solved anew: the exchanges above add up rounding.
    return pivots, torch.linalg.solve(u[pivots], u[others], left=False)
