"""Bugs that tests plant in the Triton kernels: one small change of the source each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        kernel: file of kernels/ without its suffix.
        right: the source's text.
        wrong: the text with the bug.
        kind: bounds, indexing, sum, split-K, overlap (of launches), rounding, bias or activation.
        core: whether `make test` plants it; `make test-all` plants them all.
    """

    kernel: str
    right: str
    wrong: str
    kind: str
    core: bool = False


WAIT = "        tl.extra.cuda.gdc_wait()\n"
MUTANTS = {
    "up stores rows past the last": Mutant(
        "up", "inside = (m2 < tokens) & (o2 < n)", "inside = m2 < tokens", "bounds", core=True
    ),
    "up stores tokens past the last": Mutant("up", "inside = (m2 < tokens) & (o2 < n)", "inside = o2 < n", "bounds"),
    "up reads z past the rank": Mutant("up", "mask=in_tokens & (c[None, :] < r)", "mask=in_tokens", "bounds"),
    "up takes another shard's z": Mutant(
        "up", "z_at, u_at = tl.where(third, r0 + r1, z_at)", "z_at, u_at = tl.where(third, r1, z_at)", "indexing"
    ),
    "up takes the first shard's places": Mutant("up", "tl.where(second, n0, 0)", "tl.where(second, 0, 0)", "indexing"),
    "up takes the row's bias, not its place's": Mutant(
        "up", "acc += tl.load(bias + place", "acc += tl.load(bias + o2", "bias", core=True
    ),
    "up skips a step of the sum": Mutant("up", "range(0, r, BLOCK_K)", "range(BLOCK_K, r, BLOCK_K)", "sum", core=True),
    "up scatters rows that are no outputs": Mutant(
        "up", "known = (m < tokens) & (place >= 0)", "known = (m < tokens) & (place >= -1)", "bounds"
    ),
    "up scatters another block of rows": Mutant("up", "pid_n - blocks, pid_m", "pid_n - blocks + 1, pid_m", "indexing"),
    "up does not count the second shard's programs": Mutant(
        "up", "blocks += tl.cdiv(n1, BLOCK_N)", "blocks += 0", "indexing", core=True
    ),
    "up scatters rows without their bias": Mutant(
        "up", "mask=place >= 0, other=0.0)", "mask=place < 0, other=0.0)", "bias"
    ),
    "up scatters rows before they are written": Mutant(
        "up", f"        {WAIT}            _place", "            _place", "overlap"
    ),
    "up reads z before it is written": Mutant("up", f"{WAIT}    acc", "    acc", "overlap", core=True),
    "down's parts overlap": Mutant(
        "down",
        "end = tl.minimum(columns, begin + each)",
        "end = tl.minimum(columns, begin + each + BLOCK_K)",
        "sum",
        core=True,
    ),
    "down's first program to end adds the parts": Mutant(
        "down", "if ended < SPLIT_K - 1:", "if ended > 0:", "split-K", core=True
    ),
    "down's programs all add the parts": Mutant("down", "if ended < SPLIT_K - 1:", "if ended < 0:", "split-K"),
    "down does not reset its counters": Mutant(
        "down", "tl.store(counters + tile, 0)", "tl.store(counters + tile, 1)", "split-K", core=True
    ),
    "down has one counter for all tokens": Mutant(
        "down", "tile = pid_m * tl.num_programs(0) + pid_r", "tile = pid_r", "indexing", core=True
    ),
    "down reads x past the last token": Mutant(
        "down", "in_tokens = m[:, None] < tokens", "in_tokens = m[:, None] < tokens + 1", "bounds"
    ),
    "down reads columns past the last": Mutant(
        "down", "mask=in_tokens & (c[None, :] < columns)", "mask=in_tokens", "bounds"
    ),
    "down reads weights past the last row": Mutant("down", "tl.minimum(r, rows - 1)", "r", "bounds", core=True),
    "down stores rows past the last": Mutant(
        "down", "inside = (m2 < tokens) & (r2 < rows)", "inside = m2 < tokens", "bounds"
    ),
    "down rounds its sum at each step": Mutant(
        "down",
        "acc, input_precision",
        "acc.to(tl.bfloat16).to(tl.float32), input_precision",
        "rounding",
        core=True,
    ),
    "down reads x before it is written": Mutant("down", WAIT, "", "overlap", core=True),
    "gated takes the gate's z for both": Mutant(
        "gated", "z_row + z0, z_row + z1", "z_row + z0, z_row + z0", "indexing", core=True
    ),
    "gated's second up factor begins elsewhere": Mutant(
        "gated", "u + n0.to(tl.int64) * r0", "u + n0.to(tl.int64) * r1", "indexing"
    ),
    "gated takes the gate's places for both": Mutant("gated", "places + half", "places", "indexing"),
    "gated reads pivots as rows": Mutant(
        "gated", "known1 = known1 & (place1[:, None] >= 0)", "known1 = known1", "bounds"
    ),
    "gated takes the next component of z": Mutant("gated", "z_stride - 1 - place", "z_stride - place", "indexing"),
    "gated takes the gate's bias for both": Mutant("gated", "bias + half", "bias", "bias", core=True),
    "gated applies a wrong SiLU": Mutant(
        "gated", "gate / (1.0 + tl.exp(-gate))", "gate / (1.0 + tl.exp(-other))", "activation", core=True
    ),
    "gated stores outputs past the last": Mutant(
        "gated", "inside = (m2 < tokens) & (o2 < half)", "inside = m2 < tokens", "bounds", core=True
    ),
    "gated reads z before it is written": Mutant("gated", WAIT, "", "overlap", core=True),
    "gated ends both sums with the gate's": Mutant("gated", "tl.maximum(r0, r1)", "r0", "sum", core=True),
    "gated's second sum runs past its end": Mutant(
        "gated", "known1 = c[None, :] < r1", "known1 = c[None, :] < tl.maximum(r0, r1)", "sum"
    ),
    "up takes the first shard's scales": Mutant("up", "u_scale + p_at + o2", "u_scale + o2", "indexing"),
    "down takes one row's scale for all": Mutant("down", "v_scale + r2", "v_scale + 0 * r2", "indexing"),
    "gated takes the gate's scales for both": Mutant(
        "gated", "u_scale + n0 + tl.maximum(place1, 0)", "u_scale + tl.maximum(place1, 0)", "indexing"
    ),
    "permute stores outputs past the last": Mutant(
        "permute", "(m < tokens) & there[None, :]", "m < tokens", "bounds", core=True
    ),
    "permute takes the gate's sources for both": Mutant(
        "permute", "sources + half + o", "sources + o", "indexing", core=True
    ),
    "permute takes the gate's bias for both": Mutant("permute", "bias + half + o", "bias + o", "bias", core=True),
}


def planted(mutant: Mutant, source: str) -> str:
    """The source of the mutant's kernel with its bug."""
    assert mutant.right in source, mutant
    return source.replace(mutant.right, mutant.wrong)
