"""The plain definitions of a factored projection, in any dtype, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def factored_linear(
    x: torch.Tensor, v: torch.Tensor, us: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = cat_i(U_i z_i) + bias with z = V x, the down factors of all shards stacked.

    Args:
        x: [..., in].
        v: [sum r_i, in], the shards' down factors one under the other.
        us: the up factors [n_i, r_i].
        bias: [sum n_i] or None.

    Returns:
        [..., sum n_i] in x's dtype.
    """
    z = F.linear(x, v).split([u.shape[1] for u in us], dim=-1)
    biases = [None] * len(us) if bias is None else bias.split([u.shape[0] for u in us])
    parts = [F.linear(part, u, b) for part, u, b in zip(z, us, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def other_rows(pivots: torch.Tensor, rows: int) -> torch.Tensor:
    """The row numbers below `rows` that are not in `pivots`, ascending, int64."""
    mask = torch.ones(rows, dtype=torch.bool, device=pivots.device)
    mask[pivots.long()] = False
    return mask.nonzero()[:, 0]


def pivot_linear(
    x: torch.Tensor, p: torch.Tensor, c: torch.Tensor, pivots: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[pivots] = z and y[others] = C z with z = P x, plus bias (PIFA, arXiv 2501.19090).

    Args:
        x: [..., in].
        p: [r, in], the weight's pivot rows.
        c: [out - r, r], the other rows in terms of them.
        pivots: int [r], where the rows of `p` belong.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    z = F.linear(x, p)
    y = z.new_empty(*z.shape[:-1], p.shape[0] + c.shape[0])
    y[..., pivots.long()] = z
    y[..., other_rows(pivots, y.shape[-1])] = F.linear(z, c)
    return y if bias is None else y + bias


def pivot_weight(p: torch.Tensor, c: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that a pivot form stands for, in its own dtype."""
    return pivot_linear(torch.eye(p.shape[1], dtype=p.dtype, device=p.device), p, c, pivots).T


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
