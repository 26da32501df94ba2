"""Error profiles: how much of a projection's output each rank keeps on the calibration inputs.

For a weight W [m, n] and inputs with Gram matrix C = sum x x^T [n, n], the best rank-r error is
e(r)^2 = min ||(W - W_r) X||_F^2 / ||W X||_F^2 = sum_{i>r} s_i / sum_i s_i, where s_i are the
eigenvalues of W C W^T (PGSVD, arXiv 2510.05544, section 3). No inverse of C is taken, so inputs
that span fewer than n directions are no special case.
"""

import torch

from pgsvd_vllm.offline.linalg import tail_energy


def error_profile(energy: torch.Tensor) -> torch.Tensor:
    """e(r) for r = 0 .. len(energy), float64; e(0) = 1, never rising.

    Args:
        energy: descending eigenvalues from `output_energy`.
    """
    total = energy.sum()
    if total <= 0:
        # The inputs never excite this projection: any rank is exact.
        profile = torch.zeros(len(energy) + 1, dtype=torch.float64)
        profile[0] = 1.0
        return profile
    return (tail_energy(energy) / total).clamp(0, 1).sqrt()


def rank_for(profile: torch.Tensor, tolerance: float) -> int:
    """The smallest rank >= 1 with e(rank) <= tolerance."""
    # The profile falls, so its reverse is sorted: count the entries that are small enough.
    small = int(torch.searchsorted(profile.flip(0).contiguous(), tolerance, right=True))
    return max(1, len(profile) - small)
