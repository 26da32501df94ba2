"""Tile sizes of the low-rank kernels for a number of tokens and a layer's sizes."""

from dataclasses import dataclass, replace

# More tokens than this are left to the vendor's library, which computes what no longer waits for memory faster.
MOST_TOKENS = 256
# Ranks are padded to a multiple of this: loads of 16 bytes need it.
ALIGNMENT = 16
# Programs that a device of any size should have to choose from; four a multiprocessor of an H100.
ENOUGH_PROGRAMS = 528
MOST_PARTS = 8
# From these numbers of tokens on, tiles or the parts of their sums may be others.
CHANGES = (1, 17, 33, 65)


@dataclass(frozen=True)
class Tile:
    """How one launch is cut.

    Attributes:
        block_m: tokens a program.
        block_out: rows of the weights a program.
        block_k: columns a step.
        warps, stages: of Triton.
        split_k: programs that share a sum.
        swap: the weights are the left operand, whose side a tensor core instruction fills first.
    """

    block_m: int
    block_out: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    swap: bool = False


def down_tile(tokens: int, rows: int, columns: int) -> Tile:
    """The tile of the down product: `rows` sums over `columns`.

    With few tokens the weights' bytes are all that counts, and the rows are too few to occupy a device:
    the sums are split.
    """
    if tokens <= 16:
        return Tile(16, 32, 128, 4, 4, _parts(-(-rows // 32), columns, 128))
    if tokens <= 64:
        tiles = -(-rows // 64) * -(-tokens // 32)
        return Tile(32, 64, 128, 4, 3, _parts(tiles, columns, 128), swap=True)
    return Tile(64, 64, 64, 4, 4)


def up_tile(tokens: int) -> Tile:
    """The tile of the up products."""
    if tokens <= 16:
        return Tile(16, 32, 128, 4, 3)
    if tokens <= 64:
        return Tile(32, 64, 128, 4, 3, swap=True)
    return Tile(64, 128, 64, 8, 4)


def for_amd(tile: Tile) -> Tile:
    """The tile with two stages: AMD's programs have 64 KB of shared memory."""
    return replace(tile, stages=2)


def _parts(tiles: int, columns: int, block_k: int) -> int:
    """The power of two of parts that makes enough programs, while each part has a few steps to overlap."""
    parts = 1
    while parts < MOST_PARTS and tiles * parts < ENOUGH_PROGRAMS and columns >= 4 * block_k * parts:
        parts *= 2
    return parts
