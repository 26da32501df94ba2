"""The weights of a layer as the kernels want them.

Shards may be dense, plain factors or pivot forms, up to three of low rank, of any rank. Low-rank shards come first in
the stacked matrix that reads x, each padded to whole alignments, so that z has them and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pgsvd_vllm.kernels.layer_shape import ALIGNMENT, LayerShape
from pgsvd_vllm.kernels.padding import columns_of, spread

MOST_SHARDS = 3
# Numbers; 16 bytes of float16 and bfloat16.
GAP = 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLayer:
    """The weights of one layer.

    Args, one entry a shard, in the order of the layer's outputs:
        readers: what reads x: a down factor [r, in], or a dense weight [out, in].
        ups: what reads the down factor's output, [rows, r]; None for a dense shard.
        places: of the pivot form int64 [out], where each output is found: i >= 0 is row i of the up
            product, -1 - j is component j of the down product. None for other shards.

    and of the whole layer:
        blocks: of the down factors' rows each reader has one [ceil(r / blocks), in]; what lies between the
            products puts them together.
        exchanged: z is only whole once what lies between the products has seen it.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there are more than MOST_SHARDS low-rank shards.
    """

    def __init__(
        self,
        readers: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor | None],
        blocks: int = 1,
        exchanged: bool = False,
    ) -> None:
        self.columns = readers[0].shape[1]
        self.dtype, device = readers[0].dtype, readers[0].device
        self.blocks = blocks
        self._check(readers, ups)
        self.outs = outs = [
            len(place) if place is not None else len(reader if up is None else up)
            for reader, up, place in zip(readers, ups, places, strict=True)
        ]
        self.out = sum(outs)
        starts = [sum(outs[:i]) for i in range(len(outs))]
        # A rank of tensor parallelism may hold nothing but pivot rows of a shard: then there is no up product.
        low_rank = [i for i, up in enumerate(ups) if up is not None and (len(up) or exchanged)]
        # v, y's columns of its rows; u, y's columns of its rows; of an exchanged z the pivots, y's columns of them
        stacked: list[torch.Tensor] = []
        own, flat, above = [], [], []
        pivots, pivot_columns = [], []
        self.widths: list[int] = []
        self.ranks: list[int] = []
        self.heights: list[int] = []
        self.v_starts = [0] * len(readers)
        for i in [*low_rank, *(i for i in range(len(readers)) if i not in low_rank)]:
            reader, up, place = readers[i], ups[i], places[i]
            columns = starts[i] + torch.arange(outs[i], device=device)
            missing = -len(reader) % ALIGNMENT if i in low_rank else 0
            self.v_starts[i] = sum(len(part) for part in stacked)
            stacked.append(F.pad(reader, (0, 0, 0, missing)) if missing else reader)
            mine = columns.new_full((len(reader) + missing,), -1) if up is not None else columns
            theirs = columns if place is None or up is None else columns.new_zeros(len(up))
            if place is not None:
                components, outputs = -1 - place[place < 0], columns[place < 0]
                if exchanged:
                    pivots.append(sum(self.ranks) + columns_of(components, len(reader), missing))
                    pivot_columns.append(outputs)
                else:
                    mine[components] = outputs
                theirs[place[place >= 0]] = columns[place >= 0]
            own.append(mine)
            if up is not None and i in low_rank:
                flat.append(spread(up, blocks, len(reader), missing).reshape(-1))
                above.append(theirs)
                self.widths.append(len(reader) + missing)
                self.ranks.append(blocks * self.widths[-1])
                self.heights.append(len(up))
        self.v = torch.cat(stacked).contiguous()
        self.u = torch.cat(flat).contiguous() if flat else self.v.new_empty(0)
        self.z_rows = sum(self.widths)
        self.offsets = [starts[i] for i in low_rank]
        has_own = any(up is None for up in ups) or (not exchanged and any(place is not None for place in places))
        self.own_places = torch.cat(own).int() if has_own else None
        has_pivots = any(places[i] is not None for i in low_rank)
        self.up_places = torch.cat(above).int() if has_pivots else None
        self.pivots = torch.cat(pivots) if pivots else None
        self.pivot_columns = torch.cat(pivot_columns) if pivots else None
        # For torch's products: of the rows of v, the exchanged components and the up products' rows, side by side,
        # which is an output; None where the up products' rows are the outputs as they are.
        self.between = sum(self.ranks) if pivots else 0
        scattered = self.own_places is not None or has_pivots
        # Widths of what lies side by side, each with the gap to the next: all begin aligned, or cuBLAS would be slower.
        widths = [len(self.v), self.between, *self.heights] if scattered else self.heights
        self.beside = [size for width in widths for size in (width, -width % GAP if scattered else 0)]
        self.sources = self._sources(above) if scattered else None
        sizes = [height * rank for height, rank in zip(self.heights, self.ranks, strict=True)]
        self.up_factors = [
            part.view(height, rank)
            for part, height, rank in zip(self.u.split(sizes), self.heights, self.ranks, strict=True)
        ]

    def tensors(self) -> list[torch.Tensor]:
        """All that launches and torch's products read, in a fixed order."""
        found = [self.v, self.u, self.own_places, self.up_places, self.pivots, self.pivot_columns, self.sources]
        return [tensor for tensor in found if tensor is not None]

    @property
    def sizes(self) -> LayerShape:
        """What its best tiles depend on."""
        heights = sum(self.heights)
        rank = len(self.u) // heights if heights else 0
        return LayerShape(self.columns, len(self.v), heights, rank, len(self.ranks), self.sources is not None)

    def _sources(self, above: Sequence[torch.Tensor]) -> torch.Tensor:
        """int32 [out]: which column of torch's products, side by side, an output is."""
        device = self.v.device
        own, exchanged = (torch.full((width,), -1, device=device) for width in (len(self.v), self.between))
        if self.own_places is not None:
            own = self.own_places.long()
        if self.pivots is not None and self.pivot_columns is not None:
            exchanged[self.pivots] = self.pivot_columns
        gaps = [torch.full((gap,), -1, device=device) for gap in self.beside[1::2]]
        found = zip((own, exchanged, *above), gaps, strict=True)
        place = torch.cat([part for pair in found for part in pair])
        columns = (place >= 0).nonzero()[:, 0]
        sources = torch.empty(self.out, dtype=torch.int32, device=device)
        sources[place[columns]] = columns.int()
        return sources

    def _check(self, readers: Sequence[torch.Tensor], ups: Sequence[torch.Tensor | None]) -> None:
        low_rank = [(reader, up) for reader, up in zip(readers, ups, strict=True) if up is not None]
        if len(low_rank) > MOST_SHARDS:
            raise ValueError(f"{len(low_rank)} low-rank shards; the kernels take up to {MOST_SHARDS}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype}: the kernels take float16, bfloat16 and float32")
        for tensor in (*readers, *(up for _, up in low_rank)):
            if tensor.dtype != self.dtype or tensor.ndim != 2:
                raise ValueError(f"weights of {tensor.dtype} {tuple(tensor.shape)} beside {self.dtype}")
        if any(reader.shape[1] != self.columns for reader in readers):
            raise ValueError(f"shards of different inputs: {[reader.shape[1] for reader in readers]}")
        if any(-(-up.shape[1] // self.blocks) != len(reader) for reader, up in low_rank):
            raise ValueError("an up factor of another rank than its down factor")


class Gate:
    """How a layer of two shards is run for silu(first) * second alone.

    Args:
        layer: the packed layer.
        ups, places: as it was made of.

    Attributes:
        half: outputs.
        ranks, height: the shards' padded ranks, 0 without an up product; the rows of the first one's.
        starts: where each shard's begin.
        places: int32 [2, half] as of `gated_kernel`, None where both shards are plain factors.

    Raises:
        ValueError: the layer has not two shards of the same outputs.
    """

    def __init__(
        self, layer: PackedLayer, ups: Sequence[torch.Tensor | None], places: Sequence[torch.Tensor | None]
    ) -> None:
        if len(layer.outs) != 2 or layer.outs[0] != layer.outs[1]:
            raise ValueError(f"shards of {layer.outs} outputs: a gate and what it gates have the same")
        self.half = layer.outs[0]
        self.starts = layer.v_starts
        heights = [0 if up is None else len(up) for up in ups]
        ranks = iter(layer.ranks)
        self.ranks = [next(ranks) if height else 0 for height in heights]
        self.height = heights[0]
        # Where an output of each shard is found; a dense shard's are all rows of v.
        outputs = torch.arange(self.half, device=layer.v.device)
        found = [
            -1 - outputs if up is None else outputs if place is None else place
            for up, place in zip(ups, places, strict=True)
        ]
        plain = all(up is not None and place is None for up, place in zip(ups, places, strict=True))
        self.places = None if plain else torch.stack(found).int()
