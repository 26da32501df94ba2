"""Predicted times of a layer's GEMMs on a GPU in CUDA graphs, fitted to Llama-2-7B's layers as measured on an H100.

Five constants are fitted: the fixed times of a dense GEMM, of our two launches and of a library's launch, the rate of
its tiles of 64 x 64, and the bytes of the permute kernel. Bandwidth and peak are the reached rates of
`benchmarks/roofline.py`; the rates of the other tiles are estimates, made before the fit. It reproduces the 48 measured
speed-ups of docs/kernels.md, three sizes of both forms for 1 to 2048 tokens in bf16, within 11 % (root mean square 5
%), and those of an H200, which it was not fitted to, within 15 % (5 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
from pgsvd_vllm.kernels.tile_heuristics import default_steps, tiles_for

NUMBER = 2  # bytes of a weight or activation
# Fixed microseconds of a dense GEMM, of our two launches together, and of a library's launch.
DENSE, OWN, LIBRARY = 2.4, 5.8, 3.1
# Tokens and outputs of a library's tile -> the share of the peak rate that it reaches.
TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.9, (64, 64): 0.35, (16, 64): 0.3}
SPLITS = (1, 2, 4, 8)
# Bytes that the permute kernel moves for each output and token.
PERMUTED = 4


@dataclass(frozen=True)
class Gpu:
    """The rates that GEMMs reach.

    Attributes:
        bandwidth: bytes a microsecond.
        peak: FLOPs a microsecond in bf16.
        processors: multiprocessors.
    """

    bandwidth: float
    peak: float
    processors: int


GPUS = {"H100": Gpu(3.0e6, 790e6, 132), "H200": Gpu(4.3e6, 790e6, 132)}


def gemm(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Microseconds of a GEMM [tokens, columns] x [rows, columns]^T without its launch: its bytes, or waves of tiles."""
    moved = NUMBER * (rows * columns + tokens * (rows + columns)) / gpu.bandwidth

    def waves(height: int, width: int, rate: float, split: int) -> float:
        tiles = -(-tokens // height) * -(-rows // width) * split
        flops = 2 * height * width * columns / split
        return -(-tiles // gpu.processors) * flops * gpu.processors / (gpu.peak * rate)

    return max(moved, min(waves(*tile, rate, split) for tile, rate in TILES.items() for split in SPLITS))


def dense(gpu: Gpu, tokens: int, outs: Sequence[int], columns: int) -> float:
    """Microseconds of a dense layer with outputs of these sizes."""
    return DENSE + gemm(gpu, tokens, sum(outs), columns)


def factored(gpu: Gpu, tokens: int, shards: Sequence[ShardShape], columns: int) -> float:
    """Microseconds of a layer whose shards are all low-rank, in bf16."""
    ranks = [shard.rank or shard.out for shard in shards]
    ups = [(shard.out - (shard.pivots or 0), rank) for shard, rank in zip(shards, ranks, strict=True)]
    shape = layer_shape_of(shards, columns)
    tiles = tiles_for(default_steps(shape), tokens)
    time = gemm(gpu, tokens, sum(ranks), columns) + sum(gemm(gpu, tokens, rows, rank) for rows, rank in ups)
    if tiles is not None:
        return time + (OWN if tiles[0] is not None else 2 * LIBRARY)
    time += (1 + len(ups)) * LIBRARY
    if shape.scattered:
        time += LIBRARY + PERMUTED * tokens * sum(shard.out for shard in shards) / gpu.bandwidth
    return time
