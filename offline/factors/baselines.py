"""Rivals of the product's method, for comparison: the same ratio for every projection, another norm.

svd      plain truncated SVD
asvd     SVD of W S, S = diag(s^alpha) with s the size of each input (ASVD, arXiv 2312.05821; s is
         the root mean square here, its mean absolute value there)
svd-llm  SVD of W whitened by its inputs, truncation-optimal (SVD-LLM, arXiv 2403.07378)
pifa     the same ratio in pivot form, with error-aware targets (MPIFA, arXiv 2501.19090)
"""

import torch

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
