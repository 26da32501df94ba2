"""The sizes of a layer: of its shards, and what the best tiles depend on."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pgsvd_vllm.kernels.tiles import ALIGNMENT


@dataclass(frozen=True)
class Shard:
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
class Sizes:
    """What the best tiles of a layer depend on.

    Attributes:
        columns: the layer's inputs.
        rows: of the matrix that reads x.
        heights: rows of all up factors together; 0 without any.
        rank: of the up factors, on average.
    """

    columns: int
    rows: int
    heights: int
    rank: int

    def distance(self, other: "Sizes") -> float:
        """The largest ratio of two sizes, 1 or more; infinite for other columns."""
        if self.columns != other.columns or (self.heights == 0) != (other.heights == 0):
            return math.inf
        pairs = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return max(max(a, b, 1) / max(min(a, b), 1) for a, b in pairs)


def sizes_of(shards: Sequence[Shard], columns: int) -> Sizes:
    """The sizes that such a layer has once it is packed, without making it."""
    low_rank = [(shard, shard.rank, shard.out - (shard.pivots or 0)) for shard in shards if shard.rank is not None]
    low_rank = [(shard, -(-rank // ALIGNMENT) * ALIGNMENT, height) for shard, rank, height in low_rank if height]
    heights = sum(height for _, _, height in low_rank)
    others = sum(shard.rank or shard.out for shard in shards) - sum(shard.rank or 0 for shard, _, _ in low_rank)
    mean = sum(rank * height for _, rank, height in low_rank) // heights if heights else 0
    return Sizes(columns, others + sum(rank for _, rank, _ in low_rank), heights, mean)
