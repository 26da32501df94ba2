"""Rivals of the product's method, for comparison: the same ratio for every projection, another norm.

svd      plain truncated SVD
asvd     SVD of W S, S = diag(s^alpha) with s the size of each input (ASVD, arXiv 2312.05821; s is
         the root mean square here, its mean absolute value there)
svd-llm  SVD of W whitened by its inputs, truncation-optimal (SVD-LLM, arXiv 2403.07378)
pifa     the same ratio in pivot form, with error-aware targets (MPIFA, arXiv 2501.19090)
"""

from collections.abc import Sequence

import torch

from pgsvd_vllm.offline.allocate import Allocation, saves, size
from pgsvd_vllm.offline.model_source import Projection

BASELINES = ("svd", "asvd", "svd-llm", "pifa")
ASVD_ALPHA = 0.5


def norm_of(baseline: str, gram: torch.Tensor) -> torch.Tensor:
    """The matrix that takes the Gram matrix's place in a baseline's objective, [in, in]."""
    if baseline == "svd":
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if baseline == "asvd":
        # S^2 of W S, where s^2 is the diagonal of the Gram matrix; inputs that are always 0 keep a little.
        energy = gram.diagonal()
        return energy.clamp_min(1e-8 * energy.mean()).pow(ASVD_ALPHA).diag()
    return gram


def at_equal_ratio(projections: Sequence[Projection], ratio: float, form: str, ignored: int = 0) -> Allocation:
    """Every projection loses the same share: the largest rank that leaves at most (1 - ratio) of its numbers.

    Args:
        projections: those that are factored.
        ratio: share of each one's parameters.
        form: how low-rank matrices are stored.
        ignored: parameters of the projections that were told to stay dense.
    """
    ranks, kept, total = {}, ignored, ignored
    for p in projections:
        limit = (1 - ratio) * p.numel
        fitting = [r for r in range(1, min(p.out_features, p.in_features) + 1) if saves(p, r, form)]
        fitting = [r for r in fitting if size(p, r, form) <= limit] or fitting[:1]
        total += p.numel
        if fitting:
            ranks[p.name] = fitting[-1]
            kept += size(p, fitting[-1], form)
        else:
            kept += p.numel
    return Allocation({}, ranks, 1 - kept / total)
