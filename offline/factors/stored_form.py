"""Rounds float64 factors to the tensors of a stored form; the second tensor is refitted to the rounded first one."""

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.lowrank import other_rows
from pgsvd_vllm.offline.factors.solvers import Factors
from pgsvd_vllm.offline.linalg import cholesky

# Bound on the coefficients that express the other rows by the pivot rows.
PIVOT_GROWTH = 2.0
# Ridge of the refitted coefficients, as a share of the mean energy of the pivot rows' outputs.
PIVOT_RIDGE = 1e-8


def stored_form(
    factors: Factors,
    weight: torch.Tensor,
    gram: torch.Tensor,
    form: str,
    dtype: torch.dtype,
    metric: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a form (see `format.schema.FORMS`) in the stored dtype.

    One tensor is rounded first; the other is refitted to it in the same norm before it is rounded.

    Args:
        factors: U [m, r] and V [r, n] in float64.
        weight: the target [m, n].
        gram: C [n, n].
        form: `factors` or `pivot`.
        dtype: of the stored tensors; pivots are int32.
        metric: L [m, m] of the norm ||L^T (W - U V) X||_F; the identity if None.

    Returns:
        suffix -> tensor, on the device of the factors.
    """
    if form == "factors":
        u, v = _round_factors(factors, weight, dtype, metric)
        return {"weight_v": v, "weight_u": u}
    p, c, pivots = _round_pivots(factors, weight, gram, dtype, metric)
    return {"weight_p": p, "weight_c": c, "pivots": pivots}


def not_finite(name: str, dtype: torch.dtype) -> InputError:
    """The error for factors of a projection that exceed the range of the stored dtype."""
    wider = "use `dtype` float32 or bfloat16, or " if dtype == torch.float16 else ""
    return InputError(f"{name}: its factors are not finite in {dtype}; {wider}leave it dense with `ignore` {name}")


def _round_factors(
    factors: Factors, weight: torch.Tensor, dtype: torch.dtype, metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, r] and V [r, n] in `dtype`, V refitted to the rounded U.

    The best V for a given U is the least-squares solution of L^T U V = L^T W. It does not depend on the inputs.
    """
    u = factors.u.to(dtype)
    exact, target = u.double(), weight.double()
    if metric is not None:
        exact, target = metric.T @ exact, metric.T @ target
    v = torch.cholesky_solve(exact.T @ target, cholesky(exact.T @ exact, 0)[0])
    return u.contiguous(), v.to(dtype).contiguous()


def _round_pivots(
    factors: Factors, weight: torch.Tensor, gram: torch.Tensor, dtype: torch.dtype, metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [r, n] and C [m - r, r] in `dtype` and the pivots int32 [r], C refitted to the rounded P.

    The form is that of PIFA (arXiv 2501.19090). With G = L L^T, D = W - U V for the rounded P and the old C, and o the
    rows that are not pivots, the error is least at C + G_oo^-1 (G D X X^T P^T)_o (P X X^T P^T)^-1.
    """
    pivots, c = choose_pivots(factors.u)
    others = other_rows(pivots, len(factors.u))
    p = (factors.u[pivots] @ factors.v).to(dtype)
    exact = p.double()
    gram = gram.double()
    projected = gram @ exact.T
    inner = exact @ projected
    # The ridge keeps the old C for directions of P with almost no energy in the inputs.
    root, _ = cholesky(inner, PIVOT_RIDGE)
    residual = weight.double()[others] - c @ exact
    if metric is None:
        gradient = residual @ projected
    else:
        residuals = torch.empty_like(weight, dtype=torch.float64)
        residuals[others], residuals[pivots] = residual, weight.double()[pivots] - exact
        rows = metric[others]
        gradient = torch.cholesky_solve(rows @ (metric.T @ (residuals @ projected)), cholesky(rows @ rows.T, 0)[0])
    c = c + torch.cholesky_solve(gradient.T, root).T
    return p.contiguous(), c.to(dtype).contiguous(), pivots.int()


def choose_pivots(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose r rows of U [m, r] that express all other rows with small coefficients.

    LU decomposition with row pivoting gives a start. Single rows are then exchanged until no coefficient exceeds
    PIVOT_GROWTH, which is the max-volume algorithm of Goreinov et al. 2010, "How to find a good submatrix". Small
    coefficients keep the rounding errors of P small.

    Args:
        u: [m, r] of rank r.

    Returns:
        pivots int64 [r], ascending, and C [m - r, r] with U[others] = C U[pivots].
    """
    m, r = u.shape
    _, swaps = torch.linalg.lu_factor(u)
    rows = list(range(m))
    for i, j in enumerate(swaps.tolist()):  # LAPACK counts from 1
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
    # The updates of c accumulate rounding errors: solve once more.
    return pivots, torch.linalg.solve(u[pivots], u[others], left=False)
