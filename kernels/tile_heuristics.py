"""Tile sizes of the low-rank kernels for a number of tokens and a layer's sizes.

Measured on an H200 (docs/kernels.md): with few tokens our kernels are the fastest. With more tokens cuBLAS is faster,
first for the down GEMM, then for the whole layer, except that it runs the up GEMMs of three shards one by one.
"""

from dataclasses import dataclass, replace
from typing import Any

from pgsvd_vllm.kernels.layer_shape import LayerShape

# cuBLAS computes more tokens than this.
MOST_TOKENS = 256
# Our kernels compute up to so many tokens: with one up GEMM, or two of a layer with scattered outputs,
SINGLE_TOKENS = 16
# with two otherwise, with three, with the activation, and with weights of 8 bits,
FEW_TOKENS = 32
# and with three whose rows are the outputs in order: cuBLAS runs them one by one. So do several of 8 bits, whose z a
# library copies and quantizes one by one.
FEW_TOKENS_OF_MANY = 64
# For those three, up to so many: our up kernel after a cuBLAS down GEMM.
MIXED_TOKENS = 128
# The most tokens of one program of the down GEMM; more tokens load the weights again.
MOST_BLOCK_M = 64
MANY_SHARDS = 3
# A GEMM with fewer programs is split finer; about one for each multiprocessor of an H100.
ENOUGH_PROGRAMS = 100
MOST_PARTS = 8


@dataclass(frozen=True)
class Tile:
    """The tile of one launch.

    Attributes:
        block_m: tokens of a program.
        block_out: rows of the weights of a program.
        block_k: columns of a step.
        warps, stages: Triton's num_warps and num_stages.
        split_k: programs that share a sum.
        swap: the weights are the left operand, the side of a tensor core instruction that is filled first.
    """

    block_m: int
    block_out: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    swap: bool = False


# The down GEMM's tile, None for cuBLAS, and the up GEMMs' tile.
Tiles = tuple[Tile | None, Tile]


@dataclass(frozen=True)
class Step:
    """The tiles of one range of token counts.

    Attributes:
        most_tokens: the largest count of the range.
        tiles: None if cuBLAS is faster.
    """

    most_tokens: int
    tiles: Tiles | None


Steps = tuple[Step, ...]


def own_tiles(tokens: int, sizes: LayerShape, gated: bool = False, amd: bool = False) -> Tiles:
    """The default tiles of our kernels for a layer of some sizes, even if cuBLAS is faster.

    Args:
        tokens: at most MOST_TOKENS.
        sizes: the layer's.
        gated: the layer computes the activation as well.
        amd: use two stages: AMD's programs have 64 KB of shared memory.
    """
    down = down_tile(tokens, sizes) if tokens <= MOST_BLOCK_M else None
    up = gated_tile(tokens) if gated else up_tile(tokens, sizes)
    changed: dict[str, Any] = {"stages": 2} if amd else {}
    if sizes.bits == 8:
        # On the left the operand comes from registers on Hopper, and is copied there 8 bytes at a time.
        changed["swap"] = False
    return (down and replace(down, **changed), replace(up, **changed))


def default_steps(sizes: LayerShape, gated: bool = False, amd: bool = False) -> Steps:
    """The steps of a layer that has not been tuned; arguments as of `own_tiles`."""
    numbers = [SINGLE_TOKENS]
    if gated or sizes.bits == 8 or sizes.shards >= MANY_SHARDS or (sizes.shards > 1 and not sizes.scattered):
        numbers.append(FEW_TOKENS)
    if sizes.bits == 8 and sizes.shards > 1:
        numbers.append(FEW_TOKENS_OF_MANY)
    elif sizes.bits == 16 and sizes.shards >= MANY_SHARDS and not sizes.scattered:
        numbers += [FEW_TOKENS_OF_MANY, MIXED_TOKENS]
    return tuple(Step(most, own_tiles(most, sizes, gated, amd)) for most in numbers)


def tiles_for(steps: Steps, tokens: int) -> Tiles | None:
    """The tiles for a number of tokens; None if cuBLAS computes them."""
    for step in steps:
        if tokens <= step.most_tokens:
            return step.tiles
    return None


def down_tile(tokens: int, sizes: LayerShape) -> Tile:
    """The tile of the down GEMM, of at most MOST_BLOCK_M tokens.

    With few tokens the GEMM is bound by reading the weights, and its rows are too few to occupy a device: split-K.
    """
    block_m = _block_m(tokens)
    block_k, stages = (64, 6) if block_m == MOST_BLOCK_M else (128, 4)
    parts = _parts(-(-sizes.rows // 64), sizes.columns, block_k)
    return Tile(block_m, 64, block_k, 4, stages, parts, swap=True)


def up_tile(tokens: int, sizes: LayerShape) -> Tile:
    """The tile of the up GEMMs."""
    if tokens > MOST_BLOCK_M:
        return Tile(128, 64, 64, 8, 4)
    if sizes.heights < 64 * ENOUGH_PROGRAMS // 2:
        return Tile(_block_m(tokens), 32, 128, 4, 3)
    return Tile(_block_m(tokens), 64, 64, 4, 6, swap=True)


def gated_tile(tokens: int) -> Tile:
    """The tile of a gate and up layer's up GEMMs, which are two sums at once."""
    block_m = _block_m(tokens)
    # Two sums of 64 x 64 need 8 warps: with 4, Triton 3.6 spills registers on sm_89.
    warps, stages = (8, 3) if block_m == MOST_BLOCK_M else (4, 4)
    return Tile(block_m, 64, 64, warps, stages, swap=True)


def _block_m(tokens: int) -> int:
    """Tokens of a program: all of them, up to MOST_BLOCK_M."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else MOST_BLOCK_M


def _parts(tiles: int, columns: int, block_k: int) -> int:
    """Parts of a split sum, a power of two: enough programs, each with columns and a few steps to overlap."""
    steps, parts = -(-columns // block_k), 1
    while parts < MOST_PARTS and tiles * parts < ENOUGH_PROGRAMS and columns >= 4 * block_k * parts:
        if -(-steps // (2 * parts)) * (2 * parts - 1) >= steps:
            break
        parts *= 2
    return parts
