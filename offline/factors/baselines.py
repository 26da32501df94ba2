"""Baseline methods for comparison: each gives every projection the same ratio and differs in its norm.

svd      truncated SVD of W
asvd     truncated SVD of W S with S = diag(s^alpha) and s the scale of each input (ASVD, arXiv 2312.05821). s is the
         root mean square of the input here, and its mean absolute value in the paper
svd-llm  truncated SVD of W whitened by the Gram matrix of its inputs (SVD-LLM, arXiv 2403.07378)
pifa     as svd-llm, in pivot form and with error-aware targets (MPIFA, arXiv 2501.19090)
"""

import torch

# alpha of the ASVD paper.
ASVD_ALPHA = 0.5


def norm_of(baseline: str, gram: torch.Tensor) -> torch.Tensor:
    """The matrix that replaces the Gram matrix in a baseline's objective.

    Args:
        baseline: one of `options.BASELINES`.
        gram: C [in, in].

    Returns:
        [in, in], in the dtype and on the device of `gram`.
    """
    if baseline == "svd":
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if baseline == "asvd":
        # S^2, where s^2 is the diagonal of the Gram matrix; the clamp keeps inputs that are always 0 invertible.
        energy = gram.diagonal()
        return energy.clamp_min(1e-8 * energy.mean()).pow(ASVD_ALPHA).diag()
    return gram
