"""Permutes the side-by-side outputs of cuBLAS GEMMs into the layer's order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    parts,
    sources,
    y,
    bias,
    tokens,
    half,
    p_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One tile of tokens and outputs.

    Args:
        parts: [tokens, ...], rows `p_stride` apart.
        sources: int32 [half], or [2 * half] with GATED: the column of `parts` for each output.
        y: [tokens, half], contiguous; with GATED silu(first half) * second half.
        bias: added before the activation.
    """
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    there = o < half
    inside = (m < tokens) & there[None, :]
    row = parts + m.to(tl.int64) * p_stride
    found = tl.load(row + tl.load(sources + o, mask=there, other=0)[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        found += tl.load(bias + o, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        source = tl.load(sources + half + o, mask=there, other=0)
        other = tl.load(row + source[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            other += tl.load(bias + half + o, mask=there, other=0.0).to(tl.float32)[None, :]
        found = found / (1.0 + tl.exp(-found)) * other
    tl.store(y + m.to(tl.int64) * half + o[None, :], found.to(y.dtype.element_ty), mask=inside)
