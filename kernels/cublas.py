"""A whole layer by library GEMMs: for many tokens, and as a baseline.

They are those of cuBLAS (torch.mm), or for weights of 8 bits the caller's, such as CUTLASS's scaled GEMMs.
"""

from collections.abc import Callable, Sequence

import torch
import triton

from pgsvd_vllm.kernels.packed_weights import Gate, PackedLayer
from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.kernels.permute import gather_kernel

# Tokens and outputs of a program of the permute kernel.
ORDERED = (1, 1024)
# x -> x W^T of the matrix that multiplies a layer's inputs, and then of each up factor.
Gemms = Sequence[Callable[[torch.Tensor], torch.Tensor]]


def run_library(
    x: torch.Tensor,
    layer: PackedLayer,
    bias: torch.Tensor | None = None,
    collective: Collective | None = None,
    kernels: bool = False,
    gemms: Gemms | None = None,
) -> torch.Tensor:
    """The layer's outputs.

    Args:
        x: [tokens, in].
        bias: [out] or None.
        collective: completes z between the GEMMs, if the layer was packed for one.
        kernels: our Triton kernel puts scattered outputs in order, instead of torch.
        gemms: of weights of 8 bits; None for cuBLAS.

    Returns:
        [tokens, out] in x's dtype.
    """
    if layer.sources is None and len(layer.ranks) == 1 and collective is None:
        if gemms is None:
            z = torch.mm(x, layer.v_columns)
            return torch.mm(z, layer.up_columns[0]) if bias is None else torch.addmm(bias, z, layer.up_columns[0])
        y = gemms[1](gemms[0](x)).contiguous()
        return y if bias is None else y.add_(bias)
    parts = _side_by_side(x, layer, collective, gemms)
    if layer.sources is None:
        return parts if bias is None else parts.add_(bias)
    if kernels:
        return _permuted(parts, layer.sources, bias, layer.out, gated=False)
    y = parts.index_select(1, layer.sources)
    return y if bias is None else y.add_(bias)


def run_library_gated(
    x: torch.Tensor, layer: PackedLayer, gate: Gate, bias: torch.Tensor | None = None, gemms: Gemms | None = None
) -> torch.Tensor:
    """silu(first shard's outputs) * second shard's, of a layer with scattered outputs.

    Returns:
        [tokens, out / 2] in x's dtype.

    Raises:
        ValueError: the outputs are in order already, so that vLLM's activation kernel can follow.
    """
    if layer.sources is None:
        raise ValueError("the layer's outputs are in their order")
    return _permuted(_side_by_side(x, layer, None, gemms), layer.sources, bias, gate.half, gated=True)


def _side_by_side(
    x: torch.Tensor, layer: PackedLayer, collective: Collective | None, gemms: Gemms | None
) -> torch.Tensor:
    """The outputs of all GEMMs side by side: the layer's outputs, or the columns that its `sources` name.

    Few calls, none of them to torch's slower methods: without CUDA graphs, thousands of tokens wait for the CPU.
    """
    if gemms is not None:
        return _scaled_side_by_side(x, layer, collective, gemms)
    whole = x.new_empty(len(x), sum(layer.beside))
    parts = torch.split_with_sizes(whole, layer.beside, 1)[::2]
    s = torch.mm(x, layer.v_columns, out=None if layer.sources is None else parts[0])
    z = s if s.shape[1] == layer.z_rows else s[:, : layer.z_rows]
    if collective is not None:
        z = collective(z)
        if layer.between:
            parts[1].copy_(z)
    if layer.ranks:
        ups = parts[len(parts) - len(layer.ranks) :]
        for part, up, y in zip(torch.split_with_sizes(z, layer.ranks, 1), layer.up_columns, ups, strict=True):
            torch.mm(part, up, out=y)
    return whole


def _scaled_side_by_side(
    x: torch.Tensor, layer: PackedLayer, collective: Collective | None, gemms: Gemms
) -> torch.Tensor:
    """The same by GEMMs that allocate their outputs."""
    s = gemms[0](x)
    z = s[:, : layer.z_rows]
    if collective is not None:
        z = collective(z)
    parts = [] if layer.sources is None else [s, z] if layer.between else [s]
    components = torch.split_with_sizes(z, layer.ranks, 1)
    parts += [gemm(part) for gemm, part in zip(gemms[1:], components, strict=True)]
    return torch.cat(parts, 1)


def _permuted(
    parts: torch.Tensor, sources: torch.Tensor, bias: torch.Tensor | None, out: int, gated: bool
) -> torch.Tensor:
    y = parts.new_empty(len(parts), out)
    if len(y):
        block_m, block_n = ORDERED
        # Tokens first: a grid's other axes end at 65535.
        gather_kernel[triton.cdiv(len(y), block_m), triton.cdiv(out, block_n)](
            *(parts, sources, y, parts if bias is None else bias, len(y), out, parts.stride(0)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            GATED=gated,
            HAS_BIAS=bias is not None,
            num_warps=4,
        )
    return y
