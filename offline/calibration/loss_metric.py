"""The metric that turns a projection's output error into a loss: the mixed Gram matrix and the root of the damped G."""

import torch

from pgsvd_vllm.offline.linalg import cholesky

# Share of the mean of G's diagonal that is added to the diagonal where losses are predicted: directions without
# gradient in the calibration data must still cost something. 0.05 to 0.2 measured alike.
DAMPING = 0.1
# The same for G and for the Gram matrix where factors are fitted: less is a closer fit of the calibration text and a
# worse one of all other text (docs/dev/log.md).
FIT_DAMPING, FIT_INPUT_DAMPING = 1.0, 0.1


def weighted_gram(gram: torch.Tensor, tokens: int, weighted: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """The average (C + C_w) / 2 of plain and gradient-weighted second moments of a projection's input.

    Args:
        gram: sum of x x^T over the calibration tokens, float64 [in, in].
        tokens: number of these tokens.
        weighted: C_w, float64 [in, in], from `LayerGradients.grams`.
        damping: share of the mean of the average's diagonal that is added to the diagonal.

    Returns:
        float64 [in, in].
    """
    average = (gram / tokens).add_(weighted).div_(2)  # one new matrix: each may have a GB
    average.diagonal().add_(damping * average.diagonal().mean())
    return average


def metric_root(moment: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Lower Cholesky factor L of the damped G: L L^T = G + damping mean(diag G) I (Martens and Grosse 2015, section 6).

    Args:
        moment: G [out, out], positive semi-definite.
        damping: share of the mean of G's diagonal that is added to the diagonal.

    Returns:
        float64 [out, out], lower triangular; the identity for G = 0.
    """
    return cholesky(moment, damping)[0]
