"""The up GEMMs of a layer's low-rank shards, block by block, in one launch."""

import triton
import triton.language as tl


@triton.jit
def _place(
    s,
    own,
    y,
    bias,
    tile,
    pid_m,
    tokens,
    rows,
    s_stride,
    y_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Scatter columns of s to their columns of y."""
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.load(own + row, mask=row < rows, other=-1)
    # Few tokens at a time: the addresses of all tokens would spill registers.
    for first in range(0, BLOCK_M, 16):
        m = (pid_m * BLOCK_M + first + tl.arange(0, 16))[:, None]
        known = (m < tokens) & (place >= 0)[None, :]
        found = tl.load(s + m.to(tl.int64) * s_stride + row[None, :], mask=known, other=0.0).to(tl.float32)
        if HAS_BIAS:
            found += tl.load(bias + place, mask=place >= 0, other=0.0).to(tl.float32)[None, :]
        tl.store(y + m.to(tl.int64) * y_stride + place[None, :], found.to(y.dtype.element_ty), mask=known)


# Output counts are not specialised: one compiled kernel serves all. Ranks are, because the compiler must know that they
# are multiples of 16, and `tl.multiple_of` has no effect on a bare argument.
@triton.jit(do_not_specialize=["tokens", "rows", "n0", "n1", "n2", "y0", "y1", "y2"])
def up_kernel(
    z,
    u,
    u_scale,
    y,
    places,
    bias,
    s,
    own,
    tokens,
    rows,
    z_stride,
    s_stride,
    y_stride,
    n0,
    n1,
    n2,
    r0,
    r1,
    r2,
    y0,
    y1,
    y2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARDS: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of tokens and of one shard's outputs, or of the columns of s that are outputs.

    Args:
        z: [tokens, r0 + r1 + r2], rows `z_stride` apart.
        u: the shards' up factors [n_i, r_i], one after the other, contiguous; the r_i are multiples of 16. With
            SCALED in 8 bits.
        u_scale: float32 [n0 + n1 + n2]; with SCALED a row of an up factor is multiplied by it.
        y: [tokens, out], rows `y_stride` apart; shard i begins at column y_i, or
        places: int32 [n0 + n1 + n2], the column of y of every row of every shard.
        bias: of the layer's outputs.
        s: [tokens, rows], rows `s_stride` apart: the output of the down GEMM.
        own: int32 [rows], the column of y of each column of s, -1 for none. With HAS_OWN, the programs after the
            shards' scatter s.

    Sums are float32 and rounded once, with the bias; scattered columns are rounded before their bias is added.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    # The sizes of this tile's shard, and the offsets of its parts of z, u, y and places. They are selected instead of
    # branched over: the compiler loses the alignment of values that come out of branches.
    n, r, tile, y_at = n0, r0, pid_n, y0
    z_at, u_at, p_at = 0, tl.cast(0, tl.int64), 0
    if SHARDS > 1:
        tiles = tl.cdiv(n0, BLOCK_N)
        second = pid_n >= tiles
        n, r, y_at = tl.where(second, n1, n), tl.where(second, r1, r), tl.where(second, y1, y_at)
        tile = tl.where(second, pid_n - tiles, tile)
        u_end = n0.to(tl.int64) * r0
        z_at, u_at, p_at = tl.where(second, r0, 0), tl.where(second, u_end, 0), tl.where(second, n0, 0)
        if SHARDS > 2:
            tiles += tl.cdiv(n1, BLOCK_N)
            third = pid_n >= tiles
            n, r, y_at = tl.where(third, n2, n), tl.where(third, r2, r), tl.where(third, y2, y_at)
            tile = tl.where(third, pid_n - tiles, tile)
            u_end += n1.to(tl.int64) * r1
            z_at, u_at = tl.where(third, r0 + r1, z_at), tl.where(third, u_end, u_at)
            p_at = tl.where(third, n0 + n1, p_at)
    if HAS_OWN:
        blocks = tl.cdiv(n0, BLOCK_N)
        if SHARDS > 1:
            blocks += tl.cdiv(n1, BLOCK_N)
        if SHARDS > 2:
            blocks += tl.cdiv(n2, BLOCK_N)
        if pid_n >= blocks:
            if PDL:
                tl.extra.cuda.gdc_launch_dependents()
                tl.extra.cuda.gdc_wait()
            _place(s, own, y, bias, pid_n - blocks, pid_m, tokens, rows, s_stride, y_stride, BLOCK_M, BLOCK_N, HAS_BIAS)
            return
    # Without these, loads are as narrow as the least aligned of several shards allows.
    r = tl.multiple_of(r, 16)
    z_at = tl.multiple_of(z_at, 16)
    u_at = tl.multiple_of(u_at, 16)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    z_row = z + z_at + m.to(tl.int64)[:, None] * z_stride
    in_tokens = m[:, None] < tokens
    # Rows past the last one load the last row and are never stored.
    u_row = u + u_at + tl.minimum(o, n - 1).to(tl.int64)[:, None] * r
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, r, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        a = tl.load(z_row + c[None, :], mask=in_tokens & (c[None, :] < r), other=0.0)
        b = tl.load(u_row + c[None, :], mask=c[None, :] < r, other=0.0)
        if SCALED:
            b = b.to(a.dtype)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SWAP:
        # Keeps neighbouring outputs in one thread: stores at places would split them otherwise.
        acc = tl.trans(acc)
    m2 = m[:, None]
    o2 = o[None, :]
    if SCALED:
        acc *= tl.load(u_scale + p_at + o2, mask=o2 < n, other=0.0)
    place = y_at + o2
    if HAS_PLACES:
        place = tl.load(places + p_at + o2, mask=o2 < n, other=0)
    if HAS_BIAS:
        acc += tl.load(bias + place, mask=o2 < n, other=0.0).to(tl.float32)
    inside = (m2 < tokens) & (o2 < n)
    tl.store(y + m2.to(tl.int64) * y_stride + place, acc.to(y.dtype.element_ty), mask=inside)
