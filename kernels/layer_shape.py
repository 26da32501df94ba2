"""The sizes of a layer: of its shards, and those that decide the best tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Ranks are padded to a multiple of this: loads of 16 bytes need it.
ALIGNMENT = 16


@dataclass(frozen=True)
class ShardShape:
    """One shard of a layer on one tensor-parallel rank.

    Attributes:
        out: its outputs.
        rank: None if it is dense.
        pivots: the number of its outputs that are pivot rows; None for plain factors.
    """

    out: int
    rank: int | None = None
    pivots: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """The sizes that decide the best tiles of a layer.

    Attributes:
        columns: the layer's inputs.
        rows: of the stacked matrix of the down GEMM.
        heights: rows of all up factors together; 0 without any.
        rank: of the up factors, on average.
        shards: number of up factors.
        scattered: some outputs are rows of the down GEMM, or their order differs from the up factors' rows.
        bits: of a stored weight, 16 or 8.
    """

    columns: int
    rows: int
    heights: int
    rank: int
    shards: int
    scattered: bool
    bits: int = 16

    def distance(self, other: "LayerShape") -> float:
        """The largest ratio of two sizes, 1 or more; infinite for layers of other columns or another sort."""
        if any(getattr(self, name) != getattr(other, name) for name in ("columns", "shards", "scattered", "bits")):
            return math.inf
        pairs = (self.rows, other.rows), (self.heights, other.heights), (self.rank, other.rank)
        return max(max(a, b, 1) / max(min(a, b), 1) for a, b in pairs)


def layer_shape_of(shards: Sequence[ShardShape], columns: int, bits: int = 16) -> LayerShape:
    """The sizes of such a layer once it is packed, without packing it."""
    low_rank = [(shard, shard.rank, shard.out - (shard.pivots or 0)) for shard in shards if shard.rank is not None]
    low_rank = [(shard, -(-rank // ALIGNMENT) * ALIGNMENT, height) for shard, rank, height in low_rank if height]
    heights = sum(height for _, _, height in low_rank)
    others = sum(shard.rank or shard.out for shard in shards) - sum(shard.rank or 0 for shard, _, _ in low_rank)
    mean = sum(rank * height for _, rank, height in low_rank) // heights if heights else 0
    scattered = any(shard.rank is None or shard.pivots is not None for shard in shards)
    rows = others + sum(rank for _, rank, _ in low_rank)
    return LayerShape(columns, rows, heights, mean, len(low_rank), scattered, bits)
