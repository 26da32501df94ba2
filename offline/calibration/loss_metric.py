"""The metric in which a projection's error is a loss: half of C weighted by gradients, and the root of the damped G."""

import torch

# Added to the diagonal of G as a share of its mean, so that directions the few gradients never
# showed still cost something (0.05 to 0.2 measured alike).
DAMPING = 0.1
# Mean of G's diagonal where there is no gradient at all: nothing, but its root can still be divided by.
LEAST_MOMENT = 1e-30


def weighted_gram(gram: torch.Tensor, tokens: int, weighted: torch.Tensor) -> torch.Tensor:
    """The second moments of a projection's input that its losses are reckoned with: (C + C_w) / 2, float64 [in, in].

    Args:
        gram: sum of x x^T over the calibration text.
        tokens: of that text.
        weighted: C_w, from `LayerGradients.grams`.
    """
    return (gram.double() / tokens + weighted.double()) / 2


def metric_root(moment: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor L of the damped G, float64: L L^T = G + DAMPING mean(diag G) I.

    Args:
        moment: G [out, out], positive semi-definite.
    """
    g = moment.double()
    mean = g.diagonal().mean().clamp_min(LEAST_MOMENT)
    return torch.linalg.cholesky(g + DAMPING * mean * torch.eye(len(g), dtype=g.dtype, device=g.device))
