"""The down GEMM of a layer: one launch over all weights that multiply x.

They are the low-rank shards' down factors, stacked, and below them the rows of dense shards. The next launch moves the
rows that are outputs of the layer to their columns: here that would delay the programs that end last.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    x,
    v,
    v_scale,
    s,
    partials,
    counters,
    tokens,
    rows,
    columns,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of tokens and rows, or one of SPLIT_K parts of its sum over columns.

    Args:
        x: [tokens, columns], rows `x_stride` apart.
        v: [rows, columns], contiguous, in x's dtype; with SCALED in 8 bits.
        v_scale: float32 [rows]; with SCALED a row of v is multiplied by it.
        s: [tokens, rows], contiguous: x v^T.
        partials: float32 [SPLIT_K, tokens, rows].
        counters: int32, zero, one for each tile; zero again afterwards.

    The program that ends last adds the parts of a sum in a fixed order, so that the result does not depend on which
    program that is. Sums are float32.
    """
    pid_r = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_m = tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    each = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = pid_k * each
    end = tl.minimum(columns, begin + each)
    x_row = x + m.to(tl.int64)[:, None] * x_stride
    in_tokens = m[:, None] < tokens
    # Rows past the last one load the last row and are never stored: no mask in the loop.
    v_row = v + tl.minimum(r, rows - 1).to(tl.int64)[:, None] * columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_R, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        if EVEN_K:
            a = tl.load(x_row + c[None, :], mask=in_tokens, other=0.0)
            b = tl.load(v_row + c[None, :], eviction_policy="evict_first")
        else:
            a = tl.load(x_row + c[None, :], mask=in_tokens & (c[None, :] < columns), other=0.0)
            b = tl.load(v_row + c[None, :], mask=c[None, :] < columns, other=0.0, eviction_policy="evict_first")
        if SCALED:
            b = b.to(a.dtype)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SWAP:
        acc = tl.trans(acc)
    m2 = m[:, None]
    r2 = r[None, :]
    inside = (m2 < tokens) & (r2 < rows)
    if SPLIT_K > 1:
        part = m2.to(tl.int64) * rows + r2
        size = tl.cast(tokens, tl.int64) * rows
        tl.store(partials + pid_k * size + part, acc, mask=inside)
        tl.debug_barrier()
        tile = pid_m * tl.num_programs(0) + pid_r
        ended = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if ended < SPLIT_K - 1:
            return
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for i in range(SPLIT_K):
            acc += tl.load(partials + i * size + part, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    if SCALED:
        acc *= tl.load(v_scale + r2, mask=r2 < rows, other=0.0)
    tl.store(s + m2.to(tl.int64) * rows + r2, acc.to(s.dtype.element_ty), mask=inside)
