"""Tile sizes of the low-rank kernels for a number of tokens and a layer's sizes."""

from dataclasses import dataclass, replace

# More tokens than this are left to the vendor's library, which computes what no longer waits for memory faster.
MOST_TOKENS = 256
# Ranks are padded to a multiple of this: loads of 16 bytes need it.
ALIGNMENT = 16
# Programs that a device of any size should have to choose from; four a multiprocessor of an H100.
ENOUGH_PROGRAMS = 528
MOST_PARTS = 8


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


Tiles = tuple[Tile, Tile]  # of the down product and of the up products


@dataclass(frozen=True)
class Step:
    """How numbers of tokens up to one are computed.

    Attributes:
        most_tokens: up to which.
        tiles: None where the vendor's library is faster.
    """

    most_tokens: int
    tiles: Tiles | None


Steps = tuple[Step, ...]


def usual_tiles(tokens: int, rows: int, columns: int, amd: bool = False) -> Tiles:
    """The tiles of a layer that nothing is known of but its sizes.

    Args:
        tokens: at most MOST_TOKENS.
        rows: of the matrix that reads x.
        columns: the layer's inputs.
        amd: two stages: AMD's programs have 64 KB of shared memory.
    """
    down, up = down_tile(tokens, rows, columns), up_tile(tokens)
    return (replace(down, stages=2), replace(up, stages=2)) if amd else (down, up)


def usual_steps(rows: int, columns: int, amd: bool = False) -> Steps:
    """The usual tiles for all numbers of tokens that the kernels take; arguments as of `usual_tiles`."""
    return tuple(Step(most, usual_tiles(most, rows, columns, amd)) for most in (16, 32, 64, MOST_TOKENS))


def tiles_for(steps: Steps, tokens: int) -> Tiles | None:
    """The tiles for a number of tokens, or None where the vendor's library takes them."""
    for step in steps:
        if tokens <= step.most_tokens:
            return step.tiles
    return None


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
    # Four warps would spill registers with fp16 on sm_100; up products of 128 rows too, or they take all on sm_80.
    return Tile(64, 64, 64, 8, 4)


def up_tile(tokens: int) -> Tile:
    """The tile of the up products."""
    if tokens <= 16:
        return Tile(16, 32, 128, 4, 3)
    if tokens <= 64:
        return Tile(32, 64, 128, 4, 3, swap=True)
    return Tile(64, 64, 64, 4, 4)


def _parts(tiles: int, columns: int, block_k: int) -> int:
    """The power of two of parts that makes enough programs, while each part has a few steps to overlap."""
    parts = 1
    while parts < MOST_PARTS and tiles * parts < ENOUGH_PROGRAMS and columns >= 4 * block_k * parts:
        parts *= 2
    return parts
