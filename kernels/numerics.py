"""A layer's outputs in float64, and the error that rounding explains, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pgsvd_vllm.kernels.quantized_matrix import Matrix
from pgsvd_vllm.kernels.shard_weights import Shard


def _exact(
    x: torch.Tensor, shards: Sequence[Shard[Matrix]], bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's outputs in float64, and the rounding error that x's dtype allows for each."""
    values, sizes = [], []  # outputs, and the same sums of absolute values
    for shard in shards:
        down = shard.down.double()
        z, z_size = x.double() @ down.T, x.double().abs() @ down.abs().T
        if shard.up is None:
            values.append(z)
            sizes.append(z_size)
            continue
        up = shard.up.double()
        out, out_size = z @ up.T, z_size @ up.abs().T
        if shard.places is not None:
            order = torch.where(shard.places < 0, out.shape[1] - 1 - shard.places, shard.places)
            out, out_size = torch.cat([out, z], 1)[:, order], torch.cat([out_size, z_size], 1)[:, order]
        values.append(out)
        sizes.append(out_size)
    value, size = torch.cat(values, 1), torch.cat(sizes, 1)
    if bias is not None:
        value, size = value + bias.double(), size + bias.double().abs()
    # Sums in float32; z and y are rounded once each, and y again where a bias is added afterwards.
    terms = x.shape[1] + max((shard.up.shape[1] for shard in shards if shard.up is not None), default=0)
    return value, (3 * torch.finfo(x.dtype).eps + 2 * terms * torch.finfo(torch.float32).eps) * size


def _difference(x: torch.Tensor, y: torch.Tensor, value: torch.Tensor, bound: torch.Tensor) -> str:
    if y.shape != value.shape or y.dtype != x.dtype:
        return f"got {tuple(y.shape)} {y.dtype}"
    off = (y.double() - value).abs()
    return "" if (off <= bound).all() else f"off by {(off / bound).max():.2f} of the rounding error"


def layer_difference(
    x: torch.Tensor, shards: Sequence[Shard[Matrix]], bias: torch.Tensor | None, y: torch.Tensor
) -> str:
    """Compare a layer's output with float64.

    Args:
        x: [tokens, in].
        shards: the layer's weights.
        bias: [out] or None.
        y: the output to judge [tokens, out], in x's dtype.

    Returns:
        A description of the difference that rounding does not explain; empty if there is none.
    """
    return _difference(x, y, *_exact(x, shards, bias))


def gated_difference(
    x: torch.Tensor, shards: Sequence[Shard[Matrix]], bias: torch.Tensor | None, y: torch.Tensor
) -> str:
    """The same for y = silu(first shard's outputs) * second shard's, [tokens, out / 2]."""
    value, bound = _exact(x, shards, bias)
    (gate, other), (gate_bound, other_bound) = value.chunk(2, 1), bound.chunk(2, 1)
    silu = F.silu(gate)
    # SiLU's slope is at most 1.1. SiLU and the multiplication each round to y's dtype after cuBLAS GEMMs.
    bound = 1.1 * gate_bound * (other.abs() + other_bound) + silu.abs() * other_bound
    bound = bound + 2 * torch.finfo(x.dtype).eps * (silu * other).abs() + 1e-30
    return _difference(x, y, silu * other, bound)
