"""From factors in float64 to the tensors of a stored form, each rounded part refitted to what was rounded before."""

import torch

from pgsvd_vllm.format.lowrank import other_rows
from pgsvd_vllm.offline.factors.solvers import Factors

# Pivot rows are exchanged until no other row is this many times as large in any of its coordinates.
PIVOT_GROWTH = 2.0


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
