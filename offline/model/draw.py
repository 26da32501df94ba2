"""Draws tokens from a model's predictions."""

import torch


def draw(shares: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One index per row, by the inverse of the cumulative distribution: far faster on a CPU than torch.multinomial.

    Args:
        shares: float32 [rows, n], finite and not negative; each row's sum is positive.
        uniform: float32 [rows], in [0, 1).

    Returns:
        int64 [rows].
    """
    summed = shares.cumsum(-1)
    total = summed[:, -1:]
    # A product that is rounded up to the total would be beyond the last index with a share.
    place = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(summed, place, right=True)[:, 0]
