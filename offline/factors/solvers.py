"""Solvers for the factors: minimise ||(W - U V) X||_F over U [m, r], V [r, n].

Everything is expressed through the Gram matrix C = sum x x^T, in float64.
"""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.linalg import gram_root

# ALS stops once its error is certified to lie this close to the optimum, relative.
ALS_TOLERANCE = 0.005
ALS_MAX_SWEEPS = 200


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
