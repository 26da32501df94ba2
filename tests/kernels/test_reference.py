"""The torch reference of a factored projection against float64 NumPy."""

import numpy as np
import pytest
import torch

from pgsvd_vllm.format.lowrank import factored_linear, pivot_linear, pivot_weight


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("shards", [[(13, 1)], [(29, 7), (11, 11), (11, 3)], [(31, 16), (31, 5)]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_matches_numpy(tokens: int, shards: list[tuple[int, int]], with_bias: bool) -> None:
    rng = np.random.default_rng(tokens + len(shards))
    width = 23
    x = rng.normal(size=(2, tokens, width))
    vs = [rng.normal(size=(rank, width)) for _, rank in shards]
    us = [rng.normal(size=shape) for shape in shards]
    bias = rng.normal(size=sum(n for n, _ in shards)) if with_bias else np.zeros(sum(n for n, _ in shards))
    expected = np.concatenate([x @ (u @ v).T for u, v in zip(us, vs, strict=True)], axis=-1) + bias
    found = factored_linear(
        torch.from_numpy(x),
        torch.from_numpy(np.concatenate(vs)),
        [torch.from_numpy(u) for u in us],
        torch.from_numpy(bias) if with_bias else None,
    )
    # Sums of at most 23 * 16 products of normal numbers, in float64.
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(("rows", "rank"), [(13, 1), (29, 28), (31, 16)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_pivot_reference_matches_numpy(tokens: int, rows: int, rank: int, with_bias: bool) -> None:
    rng = np.random.default_rng(rows)
    x, p = rng.normal(size=(2, tokens, 23)), rng.normal(size=(rank, 23))
    c = rng.normal(size=(rows - rank, rank))
    pivots = np.sort(rng.permutation(rows)[:rank])
    bias = rng.normal(size=rows) if with_bias else None
    weight = np.empty((rows, 23))
    weight[pivots] = p
    weight[[i for i in range(rows) if i not in pivots]] = c @ p
    expected = x @ weight.T + (0 if bias is None else bias)
    parts = [torch.from_numpy(a) for a in (p, c, pivots)]
    found = pivot_linear(torch.from_numpy(x), *parts, None if bias is None else torch.from_numpy(bias))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)
    np.testing.assert_allclose(pivot_weight(*parts).numpy(), weight, atol=1e-12)
