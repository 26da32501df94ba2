"""A whole layer by torch's products: for many tokens, and to compare with."""

import torch
import torch.nn.functional as F
import triton

from pgsvd_vllm.kernels.packed_weights import Gate, PackedLayer
from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.kernels.permute import gather_kernel

# Tokens and outputs that a program puts in order.
ORDERED = (1, 1024)


def run_library(
    x: torch.Tensor,
    layer: PackedLayer,
    bias: torch.Tensor | None = None,
    exchange: Collective | None = None,
    kernels: bool = False,
) -> torch.Tensor:
    """The layer's outputs.

    Args:
        x: [tokens, in].
        bias: [out] or None.
        exchange: what lies between the products, where the layer was packed for that.
        kernels: outputs that lie scattered are put in order by Triton's kernel, not torch's.

    Returns:
        [tokens, out] in x's dtype.
    """
    if layer.sources is None and len(layer.ranks) == 1 and exchange is None:
        return F.linear(F.linear(x, layer.v), layer.up_factors[0], bias)
    products = _side_by_side(x, layer, exchange)
    if layer.sources is None:
        return products if bias is None else products.add_(bias)
    if kernels:
        return _ordered(products, layer.sources, bias, layer.out, gated=False)
    y = products.index_select(1, layer.sources)
    return y if bias is None else y.add_(bias)


def run_library_gated(
    x: torch.Tensor, layer: PackedLayer, gate: Gate, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(first shard's outputs) * second shard's, of a layer whose outputs lie scattered.

    Returns:
        [tokens, out / 2] in x's dtype.

    Raises:
        ValueError: the outputs are in their order already, which the activation's own kernel takes.
    """
    if layer.sources is None:
        raise ValueError("the layer's outputs are in their order")
    return _ordered(_side_by_side(x, layer, None), layer.sources, bias, gate.half, gated=True)


def _side_by_side(x: torch.Tensor, layer: PackedLayer, exchange: Collective | None) -> torch.Tensor:
    """All that outputs are taken from: the layer's outputs, or the columns that its `sources` name.

    Few calls: where no graph replays them, with some hundreds of tokens the GPU waits for the host.
    """
    whole = x.new_empty(len(x), sum(layer.beside))
    parts = whole.split(layer.beside, 1)[::2]
    s = F.linear(x, layer.v) if layer.sources is None else torch.mm(x, layer.v.T, out=parts[0])
    z = s if s.shape[1] == layer.z_rows else s[:, : layer.z_rows]
    if exchange is not None:
        z = exchange(z)
        if layer.between:
            parts[1].copy_(z)
    if layer.ranks:
        ups = parts[len(parts) - len(layer.ranks) :]
        for part, up, y in zip(z.split(layer.ranks, 1), layer.up_factors, ups, strict=True):
            torch.mm(part, up.T, out=y)
    return whole


def _ordered(
    products: torch.Tensor, sources: torch.Tensor, bias: torch.Tensor | None, out: int, gated: bool
) -> torch.Tensor:
    y = products.new_empty(len(products), out)
    if len(y):
        block_m, block_n = ORDERED
        # Tokens first: a grid's other axes end at 65535.
        gather_kernel[triton.cdiv(len(y), block_m), triton.cdiv(out, block_n)](
            *(products, sources, y, products if bias is None else bias, len(y), out, products.stride(0)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            GATED=gated,
            HAS_BIAS=bias is not None,
            num_warps=4,
        )
    return y
