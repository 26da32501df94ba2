"""The plain definitions of a factored projection, in any dtype, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Shards = Sequence[torch.Tensor]
Maybe = Sequence[torch.Tensor | None]


def _exact(
    x: torch.Tensor, readers: Shards, ups: Maybe, places: Maybe, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's outputs in float64, and what roundings may change of each in x's dtype."""
    values, sizes = [], []  # outputs, and the same sums of absolute values
    for reader, up, place in zip(readers, ups, places, strict=True):
        z, z_size = x.double() @ reader.double().T, x.double().abs() @ reader.double().abs().T
        if up is None:
            values.append(z)
            sizes.append(z_size)
            continue
        out, out_size = z @ up.double().T, z_size @ up.double().abs().T
        if place is not None:
            order = torch.where(place < 0, out.shape[1] - 1 - place, place)
            out, out_size = torch.cat([out, z], 1)[:, order], torch.cat([out_size, z_size], 1)[:, order]
        values.append(out)
        sizes.append(out_size)
    value, size = torch.cat(values, 1), torch.cat(sizes, 1)
    if bias is not None:
        value, size = value + bias.double(), size + bias.double().abs()
    # Sums in float32; z and y are rounded once each, and y again where a bias is added afterwards.
    terms = x.shape[1] + max((up.shape[1] for up in ups if up is not None), default=0)
    return value, (3 * torch.finfo(x.dtype).eps + 2 * terms * torch.finfo(torch.float32).eps) * size


def _judged(x: torch.Tensor, y: torch.Tensor, value: torch.Tensor, bound: torch.Tensor) -> str:
    if y.shape != value.shape or y.dtype != x.dtype:
        return f"got {tuple(y.shape)} {y.dtype}"
    off = (y.double() - value).abs()
    return "" if (off <= bound).all() else f"off by {(off / bound).max():.2f} of what roundings explain"


def layer_difference(
    x: torch.Tensor, readers: Shards, ups: Maybe, places: Maybe, bias: torch.Tensor | None, y: torch.Tensor
) -> str:
    """What is wrong with a layer's output beside float64, as far as roundings do not explain it; empty if nothing is.

    Args:
        x: [tokens, in].
        readers, ups, places: the layer's shards, as PackedLayer takes them.
        bias: [out] or None.
        y: the output to judge.
    """
    return _judged(x, y, *_exact(x, readers, ups, places, bias))


def gated_difference(
    x: torch.Tensor, readers: Shards, ups: Maybe, places: Maybe, bias: torch.Tensor | None, y: torch.Tensor
) -> str:
    """The same of silu(first shard's outputs) * second shard's."""
    value, bound = _exact(x, readers, ups, places, bias)
    (gate, other), (gate_bound, other_bound) = value.chunk(2, 1), bound.chunk(2, 1)
    silu = F.silu(gate)
    # SiLU's slope is at most 1.1. It and the product are rounded to y's dtype where a library computes them.
    bound = 1.1 * gate_bound * (other.abs() + other_bound) + silu.abs() * other_bound
    bound = bound + 2 * torch.finfo(x.dtype).eps * (silu * other).abs() + 1e-30
    return _judged(x, y, silu * other, bound)
