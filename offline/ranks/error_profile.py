"""Error profiles: the smallest relative output error of a projection at each rank.

For a weight W [m, n] and inputs with Gram matrix C = sum x x^T [n, n], the best rank-r error is
e(r)^2 = min ||(W - W_r) X||_F^2 / ||W X||_F^2 = sum_{i>r} s_i / sum_i s_i, where s_i are the eigenvalues of W C W^T
(PGSVD, arXiv 2510.05544, section 3). C is never inverted, so a C of low rank needs no special case.
"""

import torch

from pgsvd_vllm.offline.linalg import tail_energy


def error_profile(energy: torch.Tensor) -> torch.Tensor:
    """The error profile of a projection.

    Args:
        energy: [n], descending eigenvalues from `output_energy`.

    Returns:
        e(r) for r = 0 .. n, float64 [n + 1]; e(0) = 1, and it never rises.
    """
    tail = tail_energy(energy)
    total = tail[0]  # not energy.sum(), which may add in another order: e(0) is exactly 1
    if total <= 0:
        # The projection's output is 0 on the calibration inputs: any rank is exact.
        profile = torch.zeros(len(energy) + 1, dtype=torch.float64)
        profile[0] = 1.0
        return profile
    return (tail / total).clamp(0, 1).sqrt()


def rank_for(profile: torch.Tensor, tolerance: float) -> int:
    """The smallest rank >= 1 with e(rank) <= tolerance.

    Args:
        profile: e(r) for r = 0 .. n, from `error_profile`.
        tolerance: relative output error.
    """
    # The reversed profile ascends: count the entries within the tolerance.
    small = int(torch.searchsorted(profile.flip(0).contiguous(), tolerance, right=True))
    return max(1, len(profile) - small)
