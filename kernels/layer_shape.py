"""The sizes of a layer: of its shards, and what the best tiles depend on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Ranks are padded to a multiple of this: loads of 16 bytes need it.
ALIGNMENT = 16


@dataclass(frozen=True)
class ShardShape:
    """One shard of a layer, as one rank of tensor parallelism holds it.

    Attributes:
        out: its outputs.
        rank: None where it is dense.
        pivots: how many of its outputs are pivot rows; None where it has plain factors.
    """

    out: int
    rank: int | None = None
    pivots: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """What the best tiles of a layer depend on.

    Attributes:
        columns: the layer's inputs.
        rows: of the matrix that reads x.
        heights: rows of all up factors together; 0 without any.
        rank: of the up factors, on average.
        shards: how many up factors there are.
        scattered: whether some outputs are rows of the matrix that reads x, or lie in another order than the up
            factors' rows.
    """

    columns: int
    rows: int
    heights: int
    rank: int
    shards: int
    scattered: bool

    def distance(self, other: "LayerShape") -> float:
        """The largest ratio of two sizes, 1 or more; infinite for layers of other columns or another sort."""
        if (self.columns, self.shards, self.scattered) != (other.columns, other.shards, other.scattered):
            return math.inf
        pairs = (self.rows, other.rows), (self.heights, other.heights), (self.rank, other.rank)
        return max(max(a, b, 1) / max(min(a, b), 1) for a, b in pairs)


def layer_shape_of(shards: Sequence[ShardShape], columns: int) -> LayerShape:
    """The sizes that such a layer has once it is packed, without making it."""
    low_rank = [(shard, shard.rank, shard.out - (shard.pivots or 0)) for shard in shards if shard.rank is not None]
    low_rank = [(shard, -(-rank // ALIGNMENT) * ALIGNMENT, height) for shard, rank, height in low_rank if height]
    heights = sum(height for _, _, height in low_rank)
    others = sum(shard.rank or shard.out for shard in shards) - sum(shard.rank or 0 for shard, _, _ in low_rank)
    mean = sum(rank * height for _, rank, height in low_rank) // heights if heights else 0
    scattered = any(shard.rank is None or shard.pivots is not None for shard in shards)
    return LayerShape(columns, others + sum(rank for _, rank, _ in low_rank), heights, mean, len(low_rank), scattered)
