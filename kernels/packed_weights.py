"""A layer's weights packed for the kernels.

Shards may be dense, plain factors or pivot forms, up to three of low rank, of any rank, all in 16 bits or all in 8. The
matrices that multiply x (down factors and dense weights) are stacked into one, the low-rank shards first, each padded
to whole alignments, so that z is one contiguous block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pgsvd_vllm.kernels.layer_shape import ALIGNMENT, LayerShape
from pgsvd_vllm.kernels.padding import columns_of, spread
from pgsvd_vllm.kernels.quantized_matrix import Matrix, QuantizedMatrix
from pgsvd_vllm.kernels.shard_weights import Shard

MOST_SHARDS = 3
# Elements; 16 bytes of float16 and bfloat16.
GAP = 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLayer:
    """The weights of one layer.

    Args:
        shards: the layer's shards, in the order of its outputs.
        blocks: tensor-parallel ranks whose blocks of z are all-gathered between the GEMMs; each down factor is then
            one block [ceil(r / blocks), in]. 1 without an all-gather.
        has_collective: a collective completes z between the GEMMs.
        dtype: of the inputs, which weights of 8 bits do not tell; None for that of the weights.

    Attributes:
        v, u: all weights that multiply x, and all up factors, flat.
        v_columns, up_columns: these matrices transposed, as views: making one takes the CPU as long as a small GEMM.
        v_scale, u_scale: float32, one scale for each row of these matrices; None for weights of 16 bits.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there are more than MOST_SHARDS low-rank shards.
    """

    def __init__(
        self,
        shards: Sequence[Shard[Matrix]],
        blocks: int = 1,
        has_collective: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        first = shards[0].down
        self.columns = first.shape[1]
        self.dtype, device = dtype or _values(first).dtype, first.device
        self.weight_dtype = first.values.dtype if isinstance(first, QuantizedMatrix) else first.dtype
        self.blocks = blocks
        self._check(shards)
        self.outs = outs = [shard.out for shard in shards]
        self.out = sum(outs)
        starts = [sum(outs[:i]) for i in range(len(outs))]
        # A tensor-parallel rank may hold nothing but pivot rows of a shard, which then needs no up GEMM.
        low_rank = [i for i, one in enumerate(shards) if one.up is not None and (len(one.up) or has_collective)]
        # v and the columns of y that its rows are; u and the columns of y that its rows are; after a collective, the
        # pivots' components of z and their columns of y.
        stacked: list[torch.Tensor] = []
        scales: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        own, flat, above = [], [], []
        pivots, pivot_columns = [], []
        self.widths: list[int] = []
        self.ranks: list[int] = []
        self.heights: list[int] = []
        self.v_starts = [0] * len(shards)
        for i in [*low_rank, *(i for i in range(len(shards)) if i not in low_rank)]:
            down, up, place = shards[i].down, shards[i].up, shards[i].places
            columns = starts[i] + torch.arange(outs[i], device=device)
            missing = -len(down) % ALIGNMENT if i in low_rank else 0
            self.v_starts[i] = sum(len(part) for part in stacked)
            stacked.append(F.pad(_values(down), (0, 0, 0, missing)) if missing else _values(down))
            if isinstance(down, QuantizedMatrix):
                scales[0].append(F.pad(down.scale[:, 0], (0, missing)))
            mine = columns.new_full((len(down) + missing,), -1) if up is not None else columns
            theirs = columns if place is None or up is None else columns.new_zeros(len(up))
            if place is not None:
                components, outputs = -1 - place[place < 0], columns[place < 0]
                if has_collective:
                    pivots.append(sum(self.ranks) + columns_of(components, len(down), missing))
                    pivot_columns.append(outputs)
                else:
                    mine[components] = outputs
                theirs[place[place >= 0]] = columns[place >= 0]
            own.append(mine)
            if up is not None and i in low_rank:
                flat.append(spread(_values(up), blocks, len(down), missing).reshape(-1))
                if isinstance(up, QuantizedMatrix):
                    scales[1].append(up.scale[:, 0])
                above.append(theirs)
                self.widths.append(len(down) + missing)
                self.ranks.append(blocks * self.widths[-1])
                self.heights.append(len(up))
        v, u = torch.cat(stacked), torch.cat(flat) if flat else stacked[0][:0, 0]
        if scales[0]:
            # Behind them is room for the rows with which `quantized` rounds heights up.
            rows, width = len(v), max(self.ranks, default=0)
            v = F.pad(v, (0, 0, 0, -rows % ALIGNMENT))[:rows]
            u = F.pad(u, (0, ALIGNMENT * width))[: len(u)]
        self.v, self.u = v.contiguous().view(self.weight_dtype), u.contiguous().view(self.weight_dtype)
        self.v_scale = torch.cat(scales[0]) if scales[0] else None
        self.u_scale = None if self.v_scale is None else torch.cat([self.v_scale[:0], *scales[1]])
        self.z_rows = sum(self.widths)
        self.offsets = [starts[i] for i in low_rank]
        pivot_forms = [shard.places is not None for shard in shards]
        has_own = any(shard.up is None for shard in shards) or (not has_collective and any(pivot_forms))
        self.own_places = torch.cat(own).int() if has_own else None
        has_pivots = any(pivot_forms[i] for i in low_rank)
        self.up_places = torch.cat(above).int() if has_pivots else None
        self.pivots = torch.cat(pivots) if pivots else None
        self.pivot_columns = torch.cat(pivot_columns) if pivots else None
        # cuBLAS writes the down outputs, z after a collective, and the up outputs side by side. `sources` names the
        # column of each output; None where the up outputs are the layer's outputs in order.
        self.between = sum(self.ranks) if pivots else 0
        scattered = self.own_places is not None or has_pivots
        # The width of each of those blocks and the gap to the next one: cuBLAS is slower on unaligned blocks.
        widths = [len(self.v), self.between, *self.heights] if scattered else self.heights
        has_gaps = scattered and self.v_scale is None
        self.beside = [size for width in widths for size in (width, -width % GAP if has_gaps else 0)]
        self.sources = self._sources(above) if scattered else None
        sizes = [height * rank for height, rank in zip(self.heights, self.ranks, strict=True)]
        self.up_factors = [
            part.view(height, rank)
            for part, height, rank in zip(self.u.split(sizes), self.heights, self.ranks, strict=True)
        ]
        self.v_columns, self.up_columns = self.v.T, [up.T for up in self.up_factors]

    def quantized(self) -> list[QuantizedMatrix]:
        """The matrix that multiplies the inputs and then each up factor, in the same memory; empty for 16 bits.

        CUTLASS wants whole alignments of rows: behind its own a matrix has rows of whatever follows it in memory, whose
        outputs are to be dropped, with scales of 0.
        """
        if self.v_scale is None or self.u_scale is None:
            return []
        found = []
        ups = zip(self.up_factors, self.u_scale.split(self.heights), strict=True)
        for values, scale in ((self.v, self.v_scale), *ups):
            missing = -len(values) % ALIGNMENT
            whole = values.as_strided((len(values) + missing, values.shape[1]), values.stride())
            # A copy: CUTLASS reads aligned vectors of scales.
            found.append(QuantizedMatrix(whole, F.pad(scale.clone(), (0, missing))[:, None], 8))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the launches and the cuBLAS GEMMs read, in a fixed order."""
        found = [self.v, self.u, self.v_scale, self.u_scale, self.own_places, self.up_places]
        found += [self.pivots, self.pivot_columns, self.sources]
        return [tensor for tensor in found if tensor is not None]

    @property
    def sizes(self) -> LayerShape:
        """The sizes that its best tiles depend on."""
        heights = sum(self.heights)
        rank = len(self.u) // heights if heights else 0
        bits = 16 if self.v_scale is None else 8
        return LayerShape(self.columns, len(self.v), heights, rank, len(self.ranks), self.sources is not None, bits)

    def _sources(self, above: Sequence[torch.Tensor]) -> torch.Tensor:
        """int32 [out]: the column of each output in the side-by-side GEMM outputs."""
        device = self.v.device
        own, after_collective = (torch.full((width,), -1, device=device) for width in (len(self.v), self.between))
        if self.own_places is not None:
            own = self.own_places.long()
        if self.pivots is not None and self.pivot_columns is not None:
            after_collective[self.pivots] = self.pivot_columns
        gaps = [torch.full((gap,), -1, device=device) for gap in self.beside[1::2]]
        found = zip((own, after_collective, *above), gaps, strict=True)
        place = torch.cat([part for pair in found for part in pair])
        columns = (place >= 0).nonzero()[:, 0]
        sources = torch.empty(self.out, dtype=torch.int32, device=device)
        sources[place[columns]] = columns.int()
        return sources

    def _check(self, shards: Sequence[Shard[Matrix]]) -> None:
        downs = [shard.down for shard in shards]
        low_rank = [(shard.down, shard.up) for shard in shards if shard.up is not None]
        if len(low_rank) > MOST_SHARDS:
            raise ValueError(f"{len(low_rank)} low-rank shards; the kernels take up to {MOST_SHARDS}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype}: the kernels take float16, bfloat16 and float32")
        for matrix in (*downs, *(up for _, up in low_rank)):
            if isinstance(matrix, QuantizedMatrix):
                scales = matrix.scale.shape[1]
                if (matrix.values.dtype, matrix.num_bits, scales) != (self.weight_dtype, 8, 1):
                    kind = f"{matrix.num_bits} bits, {matrix.values.dtype}, {scales} scales a row"
                    raise ValueError(f"weights of {kind} beside {self.weight_dtype}")
            elif matrix.dtype != self.dtype or matrix.dtype != self.weight_dtype or matrix.ndim != 2:
                raise ValueError(f"weights of {matrix.dtype} {tuple(matrix.shape)} beside {self.weight_dtype}")
        if any(down.shape[1] != self.columns for down in downs):
            raise ValueError(f"shards of different inputs: {[down.shape[1] for down in downs]}")
        if any(-(-up.shape[1] // self.blocks) != len(down) for down, up in low_rank):
            raise ValueError("an up factor of another rank than its down factor")


def _values(matrix: Matrix) -> torch.Tensor:
    """A matrix as it is packed: quantized values as bytes, since torch pads no FP8."""
    return matrix.values.view(torch.int8) if isinstance(matrix, QuantizedMatrix) else matrix


class Gate:
    """The layout of a two-shard layer for the kernel that computes silu(first) * second.

    Args:
        layer: the packed layer.
        shards: the two shards it was packed from.

    Attributes:
        half: outputs after the activation.
        ranks: the shards' padded ranks; 0 for a shard without an up GEMM.
        height: rows of the first up factor.
        starts: each shard's first row in the stacked matrix v.
        places: int32 [2, half] as of `gated_kernel`; None if both shards are plain factors.

    Raises:
        ValueError: the layer has not two shards of the same outputs.
    """

    def __init__(self, layer: PackedLayer, shards: Sequence[Shard[Matrix]]) -> None:
        if len(layer.outs) != 2 or layer.outs[0] != layer.outs[1]:
            raise ValueError(f"shards of {layer.outs} outputs: gate and up must have the same number")
        self.half = layer.outs[0]
        self.starts = layer.v_starts
        heights = [0 if shard.up is None else len(shard.up) for shard in shards]
        ranks = iter(layer.ranks)
        self.ranks = [next(ranks) if height else 0 for height in heights]
        self.height = heights[0]
        # The source of each output of each shard; the outputs of a dense shard are all rows of v.
        outputs = torch.arange(self.half, device=layer.v.device)
        found = [
            -1 - outputs if shard.up is None else outputs if shard.places is None else shard.places for shard in shards
        ]
        plain = all(shard.up is not None and shard.places is None for shard in shards)
        self.places = None if plain else torch.stack(found).int()
