"""The up GEMMs of a gate and up layer, SiLU and the multiplication, in one launch.

Neither GEMM's output is ever written: the result has half the layer's outputs.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(u, places, o, r, HAS_PLACES: tl.constexpr):
    """Pointers to the up factor's rows of one shard's outputs, and the outputs' places."""
    place = o
    if HAS_PLACES:
        place = tl.load(places + o)
    # Places below 0 point to row 0, under a mask.
    return u + tl.maximum(place, 0).to(tl.int64)[:, None] * r, place


@triton.jit
def _finished(
    acc,
    z,
    bias,
    place,
    m2,
    o2,
    inside,
    z_stride,
    HAS_PLACES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """acc plus the outputs that are components of z, plus bias."""
    if HAS_PLACES:
        own = inside & (place < 0)[None, :]
        acc += tl.load(z + m2.to(tl.int64) * z_stride - 1 - place[None, :], mask=own, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + o2).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["tokens", "n0"])
def gated_kernel(
    z,
    u,
    u_scale,
    y,
    places,
    bias,
    tokens,
    z_stride,
    half,
    n0,
    r0,
    r1,
    z0,
    z1,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of tokens and outputs: silu(gate) * other.

    Args:
        z: [tokens, ...], rows `z_stride` apart; the shards' components begin at columns z0, z1.
        u: the shards' up factors [n0, r0] and then [n1, r1], contiguous; r0 and r1 are multiples of 16. With
            SCALED in 8 bits.
        u_scale: float32 [n0 + n1]; with SCALED a row of an up factor is multiplied by it.
        y: [tokens, half].
        places: int32 [2, half]: i >= 0 is row i of the shard's up factor, -1 - j is its component j.
        bias: [2 * half].

    Sums are float32 and rounded once, at the end.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tokens = m[:, None] < tokens
    # Outputs past the last one repeat the last and are never stored.
    last = tl.minimum(o, half - 1)
    u0_row, place0 = _rows(u, places, last, r0, HAS_PLACES)
    u1_row, place1 = _rows(u + n0.to(tl.int64) * r0, places + half, last, r1, HAS_PLACES)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    z_row = z + m.to(tl.int64)[:, None] * z_stride
    z0_row, z1_row = z_row + z0, z_row + z1
    gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Both sums in one loop: two loops would drain the memory pipeline in between.
    for k in range(0, tl.maximum(r0, r1), BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        known0 = c[None, :] < r0
        known1 = c[None, :] < r1
        a0 = tl.load(z0_row + c[None, :], mask=in_tokens & known0, other=0.0)
        a1 = tl.load(z1_row + c[None, :], mask=in_tokens & known1, other=0.0)
        if HAS_PLACES:
            known0 = known0 & (place0[:, None] >= 0)
            known1 = known1 & (place1[:, None] >= 0)
        b0 = tl.load(u0_row + c[None, :], mask=known0, other=0.0)
        b1 = tl.load(u1_row + c[None, :], mask=known1, other=0.0)
        if SCALED:
            b0, b1 = b0.to(a0.dtype), b1.to(a1.dtype)
        if SWAP:
            gate = tl.dot(b0, tl.trans(a0), gate, input_precision="ieee")
            other = tl.dot(b1, tl.trans(a1), other, input_precision="ieee")
        else:
            gate = tl.dot(a0, tl.trans(b0), gate, input_precision="ieee")
            other = tl.dot(a1, tl.trans(b1), other, input_precision="ieee")
    if SWAP:
        gate, other = tl.trans(gate), tl.trans(other)
    m2, o2, last2 = m[:, None], o[None, :], last[None, :]
    inside = (m2 < tokens) & (o2 < half)
    if SCALED:
        # Rows of the factors; outputs that are components of z have a sum of 0 and any scale.
        gate *= tl.load(u_scale + tl.maximum(place0, 0), mask=place0 >= 0, other=0.0)[None, :]
        other *= tl.load(u_scale + n0 + tl.maximum(place1, 0), mask=place1 >= 0, other=0.0)[None, :]
    gate = _finished(gate, z + z0, bias, place0, m2, last2, inside, z_stride, HAS_PLACES, HAS_BIAS)
    other = _finished(other, z + z1, bias + half, place1, m2, last2, inside, z_stride, HAS_PLACES, HAS_BIAS)
    result = gate / (1.0 + tl.exp(-gate)) * other
    tl.store(y + m2.to(tl.int64) * half + o2, result.to(y.dtype.element_ty), mask=inside)
