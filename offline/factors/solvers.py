"""Solvers for the factors: they minimise ||(W - U V) X||_F over U [m, r] and V [r, n].

The inputs X enter only through the Gram matrix C = sum x x^T. All computations are in float64.
"""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.linalg import eigh, gram_root

# ALS stops at a relative output error of (1 + ALS_TOLERANCE) times the optimum.
ALS_TOLERANCE = 0.005
ALS_MAX_SWEEPS = 200


@dataclass(frozen=True)
class Factors:
    """Factors of a weight [m, n].

    Attributes:
        u: float64 [m, r].
        v: float64 [r, n].
        errors: relative output error of the start and after every ALS sweep; one element for a closed-form solution.
    """

    u: torch.Tensor
    v: torch.Tensor
    errors: list[float]


def relative_error(weight: torch.Tensor, gram: torch.Tensor, approximation: torch.Tensor) -> float:
    """The relative output error ||(W - W_r) X||_F / ||W X||_F; 0 if W X is 0.

    Args:
        weight: W [m, n].
        gram: C [n, n].
        approximation: W_r [m, n].
    """
    w, c = weight.double(), gram.double()
    residual = w - approximation.double()
    total = (w @ c).mul_(w).sum()
    if total <= 0:
        return 0.0
    return float(((residual @ c).mul_(residual).sum().clamp_min(0) / total).sqrt())


def closed_form(weight: torch.Tensor, gram: torch.Tensor, rank: int, metric: torch.Tensor | None = None) -> Factors:
    """The factors with the smallest ||L^T (W - U V) X||_F, in closed form.

    With W' = L^T W, U' holds the leading eigenvectors of W' C W'^T, U = L^-T U' and V = U'^T W'.

    Args:
        weight: W [m, n].
        gram: C [n, n].
        rank: r <= min(m, n).
        metric: L [m, m], lower triangular; the identity if None.

    Returns:
        U with columns of norm 1, V, and the relative output error without the metric.
    """
    w, c = weight.double(), gram.double()
    target = w if metric is None else metric.T @ w
    if target.shape[0] <= target.shape[1]:
        u = eigh(target @ c @ target.T)[1][:, -rank:].flip(1)
    else:
        half = target @ gram_root(c)
        u = torch.linalg.qr(half @ eigh(half.T @ half)[1][:, -rank:].flip(1)).Q
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
    """Alternating least squares (PGSVD, arXiv 2510.05544, algorithm 1), started from the SVD of W.

    One sweep solves for V given U, then for U given V:
        V = (U^T U)^-1 U^T W,   U = W C V^T (V C V^T)^-1,
    and orthonormalises U, which leaves U V unchanged. Each step is an exact minimisation, so the error never rises. The
    sweeps end when the error is within `tolerance` of the optimum. The optimum is known from the error profile and
    does not have to be estimated from the last decrease.

    Args:
        weight: W [m, n].
        gram: C [n, n].
        rank: r <= min(m, n).
        optimum: smallest relative output error at this rank, e(r) of the error profile.
        tolerance: allowed relative excess over the optimum.
        max_sweeps: bound on the number of sweeps.

    Returns:
        U with orthonormal columns, V, and the relative output error of the start and after every sweep.
    """
    w, c = weight.double(), gram.double()
    m, n = w.shape
    wc = w @ c
    total = (wc * w).sum()
    if total <= 0:
        return Factors(torch.eye(m, rank, dtype=w.dtype, device=w.device), w[:rank].clone(), [0.0])
    cross = wc @ w.T if m <= n else None
    # If W and C share axes the SVD is a saddle point that no sweep leaves; a small perturbation leaves it.
    perturbation = torch.randn(m, rank, dtype=w.dtype, generator=torch.Generator().manual_seed(0)).to(w.device)
    u = torch.linalg.qr(_leading_left_vectors(w, rank) + 1e-3 / m**0.5 * perturbation).Q
    errors: list[float] = []
    while True:
        # W C V^T with V = U^T W has the column span of the least-squares U.
        wcv = cross @ u if cross is not None else wc @ (w.T @ u)
        captured = (u * wcv).sum()
        errors.append(float(((total - captured) / total).clamp_min(0).sqrt()))
        # Below a relative error of 1e-7 the float64 sums above have no significant digits left.
        done = errors[-1] <= max(optimum * (1 + tolerance), 1e-7)
        if done or len(errors) > max_sweeps:
            return Factors(u, u.T @ w, errors)
        u = torch.linalg.qr(wcv).Q


def _leading_left_vectors(w: torch.Tensor, rank: int) -> torch.Tensor:
    """The first `rank` left singular vectors of w [m, n], from the smaller of w w^T and w^T w."""
    if w.shape[0] <= w.shape[1]:
        return eigh(w @ w.T)[1][:, -rank:]
    return torch.linalg.qr(w @ eigh(w.T @ w)[1][:, -rank:]).Q
