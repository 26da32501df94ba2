"""Tile sizes of the low-rank kernels for a number of tokens and a layer's sizes.

Measured on an H200 (docs/kernels.md): with few tokens our kernels are the fastest; then the vendor's library is,
first in the down product, then, unless it would take one product after the other for three shards, in all.
"""

from dataclasses import dataclass, replace

from pgsvd_vllm.kernels.layer_shape import LayerShape

# More tokens than this are always the vendor's library's.
MOST_TOKENS = 256
# Up to so many tokens our kernels are taken: with one up product, or two of a layer whose outputs lie scattered,
SINGLE_TOKENS = 16
# with two otherwise, with three, and with the activation,
FEW_TOKENS = 32
# and with three whose rows are the outputs as they are: the library makes them one after the other.
FEW_TOKENS_OF_MANY = 64
# For those, up to so many our up products after the library's down product.
MIXED_TOKENS = 128
# The most tokens that one program of the down product takes; for more it would read the weights again.
MOST_BLOCK_M = 64
MANY_SHARDS = 3
# Programs of a product below which it is cut finer; about one a multiprocessor of an H100.
ENOUGH_PROGRAMS = 100
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


# Of the down product, None where that is the vendor's library's, and of the up products.
Tiles = tuple[Tile | None, Tile]


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


def own_tiles(tokens: int, sizes: LayerShape, gated: bool = False, amd: bool = False) -> Tiles:
    """The tiles of our kernels for a layer that nothing is known of but its sizes, whether or not they are the fastest.

    Args:
        tokens: at most MOST_TOKENS.
        sizes: the layer's.
        gated: with the activation.
        amd: two stages: AMD's programs have 64 KB of shared memory.
    """
    down = down_tile(tokens, sizes) if tokens <= MOST_BLOCK_M else None
    up = gated_tile(tokens) if gated else up_tile(tokens, sizes)
    return (down and replace(down, stages=2), replace(up, stages=2)) if amd else (down, up)


def usual_steps(sizes: LayerShape, gated: bool = False, amd: bool = False) -> Steps:
    """What is taken where nothing has been tuned; arguments as of `own_tiles`."""
    numbers = [SINGLE_TOKENS]
    if gated or sizes.shards >= MANY_SHARDS or (sizes.shards > 1 and not sizes.scattered):
        numbers.append(FEW_TOKENS)
    if sizes.shards >= MANY_SHARDS and not sizes.scattered:
        numbers += [FEW_TOKENS_OF_MANY, MIXED_TOKENS]
    return tuple(Step(most, own_tiles(most, sizes, gated, amd)) for most in numbers)


def tiles_for(steps: Steps, tokens: int) -> Tiles | None:
    """The tiles for a number of tokens, or None where the vendor's library takes them."""
    for step in steps:
        if tokens <= step.most_tokens:
            return step.tiles
    return None


def down_tile(tokens: int, sizes: LayerShape) -> Tile:
    """The tile of the down product, of at most MOST_BLOCK_M tokens.

    With few tokens the weights' bytes are all that counts, and the rows are too few to occupy a device:
    the sums are split.
    """
    block_m = _block_m(tokens)
    block_k, stages = (64, 6) if block_m == MOST_BLOCK_M else (128, 4)
    parts = _parts(-(-sizes.rows // 64), sizes.columns, block_k)
    return Tile(block_m, 64, block_k, 4, stages, parts, swap=True)


def up_tile(tokens: int, sizes: LayerShape) -> Tile:
    """The tile of the up products."""
    if tokens > MOST_BLOCK_M:
        return Tile(128, 64, 64, 8, 4)
    if sizes.heights < 64 * ENOUGH_PROGRAMS // 2:
        return Tile(_block_m(tokens), 32, 128, 4, 3)
    return Tile(_block_m(tokens), 64, 64, 4, 6, swap=True)


def gated_tile(tokens: int) -> Tile:
    """The tile of the up products of a gate and of what it gates, which are two sums at once."""
    block_m = _block_m(tokens)
    return Tile(block_m, 64, 64, 4, 3 if block_m == MOST_BLOCK_M else 4, swap=True)


def _block_m(tokens: int) -> int:
    """Of a program that takes all tokens, if they are not too many."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else MOST_BLOCK_M


def _parts(tiles: int, columns: int, block_k: int) -> int:
    """The power of two of parts that makes enough programs, while each part has a few steps to overlap, and none no
    columns."""
    steps, parts = -(-columns // block_k), 1
    while parts < MOST_PARTS and tiles * parts < ENOUGH_PROGRAMS and columns >= 4 * block_k * parts:
        if -(-steps // (2 * parts)) * (2 * parts - 1) >= steps:
            break
        parts *= 2
    return parts
