"""The up products of a gate and of what it gates, SiLU and their product, in one launch.

Neither product is ever written: what comes out has half the layer's outputs.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(u, places, o, r, HAS_PLACES: tl.constexpr):
    """Where the rows of one shard's outputs begin, and the outputs' places."""
    place = o
    if HAS_PLACES:
        place = tl.load(places + o)
    # Places below 0 are read as row 0, under a mask.
    return u + tl.maximum(place, 0).to(tl.int64)[:, None] * r, place


@triton.jit
def _product(
    acc,
    z_row,
    u_row,
    place,
    in_tokens,
    r,
    begin,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):
    """acc plus the sums over components from `begin` on."""
    for k in range(begin, r, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        a = tl.load(z_row + c[None, :], mask=in_tokens & (c[None, :] < r), other=0.0)
        known = c[None, :] < r
        if HAS_PLACES:
            known = known & (place[:, None] >= 0)
        b = tl.load(u_row + c[None, :], mask=known, other=0.0)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


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
    SWAP: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """acc plus the outputs that are components of z, plus bias."""
    if HAS_PLACES:
        place2 = place[:, None] if SWAP else place[None, :]
        own = inside & (place2 < 0)
        acc += tl.load(z + m2.to(tl.int64) * z_stride - 1 - place2, mask=own, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + o2).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["tokens", "n0"])
def gated_kernel(
    z,
    u,
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
    PDL: tl.constexpr,
):
    """One tile of tokens and outputs: silu(gate) * other.

    Args:
        z: [tokens, ...], rows `z_stride` apart; the shards' components begin at columns z0, z1.
        u: the shards' up factors [n0, r0] and then [n1, r1], without gaps; r0 and r1 are multiples of 16.
        y: [tokens, half].
        places: int32 [2, half]: i >= 0 is row i of the shard's up factor, -1 - j its component j itself.
        bias: [2 * half].

    Sums are float32, and rounded once, at the end.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tokens = m[:, None] < tokens
    # Outputs past the last are computed as the last and never stored.
    last = tl.minimum(o, half - 1)
    u0_row, place0 = _rows(u, places, last, r0, HAS_PLACES)
    u1_row, place1 = _rows(u + n0.to(tl.int64) * r0, places + half, last, r1, HAS_PLACES)
    c = tl.arange(0, BLOCK_K)
    # Weights before the wait: they do not depend on the launch before.
    known = c[None, :] < r0
    if HAS_PLACES:
        known = known & (place0[:, None] >= 0)
    b = tl.load(u0_row + c[None, :], mask=known, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    z_row = z + m.to(tl.int64)[:, None] * z_stride
    z0_row, z1_row = z_row + z0, z_row + z1
    a = tl.load(z0_row + c[None, :], mask=in_tokens & (c[None, :] < r0), other=0.0)
    zero = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SWAP:
        gate = tl.dot(b, tl.trans(a), zero, input_precision="ieee")
    else:
        gate = tl.dot(a, tl.trans(b), zero, input_precision="ieee")
    gate = _product(gate, z0_row, u0_row, place0, in_tokens, r0, BLOCK_K, BLOCK_K, SWAP, HAS_PLACES)
    other = _product(zero, z1_row, u1_row, place1, in_tokens, r1, 0, BLOCK_K, SWAP, HAS_PLACES)
    if SWAP:
        m2, o2, last2 = m[None, :], o[:, None], last[:, None]
    else:
        m2, o2, last2 = m[:, None], o[None, :], last[None, :]
    inside = (m2 < tokens) & (o2 < half)
    gate = _finished(gate, z + z0, bias, place0, m2, last2, inside, z_stride, SWAP, HAS_PLACES, HAS_BIAS)
    other = _finished(other, z + z1, bias + half, place1, m2, last2, inside, z_stride, SWAP, HAS_PLACES, HAS_BIAS)
    result = gate / (1.0 + tl.exp(-gate)) * other
    tl.store(y + m2.to(tl.int64) * half + o2, result.to(y.dtype.element_ty), mask=inside)
