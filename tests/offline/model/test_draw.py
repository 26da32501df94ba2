"""Tokens are drawn as often as the model predicts them."""

import pytest
import torch

from pgsvd_vllm.offline.model.draw import draw


def test_indices_are_drawn_by_their_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    found = draw(shares.expand(100_000, -1), torch.rand(100_000, generator=generator)).bincount(minlength=6) / 100_000
    assert found[shares == 0].sum() == 0
    torch.testing.assert_close(found, shares, rtol=0, atol=0.006)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_the_ends_are_drawn_from_what_has_a_share(uniform: float, expected: int) -> None:
    """Sums of shares need not be 1."""
    for scale in (1.0, 0.999, 1.001, 3.0):
        shares = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]) * scale
        assert draw(shares, torch.tensor([uniform])).item() == expected
