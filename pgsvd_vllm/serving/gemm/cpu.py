"""The GEMMs of one loaded layer, for any mix of ranks and forms among its shards.

One stacked GEMM reads the layer's input: s = x [V_1; P_2; W_3; ...]^T, over the down factors of the low-rank shards and
the weights of the dense ones. Each low-rank shard has an up GEMM over its columns of s. One pass then puts the outputs
in the layer's order.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from pgsvd_vllm.format.quantization import dequantize
from pgsvd_vllm.kernels.padding import columns_of, spread
from pgsvd_vllm.kernels.quantized_matrix import Matrix, QuantizedMatrix, stacked
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.collectives import collective_of
from pgsvd_vllm.serving.vllm_compat.cpu_gemm import PACKED_IN, PACKED_INPUTS, Gemm, can_pack, packed_gemm, vllm_gemm
from pgsvd_vllm.serving.vllm_compat.internals import register_op
from pgsvd_vllm.serving.vllm_compat.quantized_gemm import quantized_gemm

OTHER_SIZES = "the new weights have other ranks or pivots than the old ones; restart the engine"


def gemm(matrix: Matrix, dtype: torch.dtype) -> Gemm:
    """The GEMM of a matrix, by the kernel that suits it.

    Args:
        matrix: [out, in]; not kept where it is packed.
        dtype: of the activations.
    """
    if isinstance(matrix, QuantizedMatrix):
        found = quantized_gemm(matrix, dtype)
        if found is not None:
            return found
        weight = dequantize(matrix.values, matrix.scale, torch.float32).to(dtype)
    else:
        weight = matrix
    if not len(weight):  # every row of the shard on this rank is a pivot row
        return Gemm(lambda x, bias: F.linear(x, weight), [weight])
    inputs = weight.shape[1]
    suits = inputs <= PACKED_INPUTS and inputs % PACKED_IN == 0 and can_pack(weight.dtype)
    return packed_gemm(weight) if suits else vllm_gemm(weight)


def _dtype_of(shards: Sequence[Shard[Matrix]]) -> torch.dtype:
    """The dtype of weights that are not quantized."""
    down = shards[0].down
    assert isinstance(down, torch.Tensor)
    return down.dtype


def _join(outputs: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    y = torch.cat(outputs, dim=-1)
    # Not index_select: on CPU, along the last dimension, it takes five times as long.
    return y if order is None else y.gather(1, order.expand(len(y), -1))


def _join_fake(outputs: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    width = sum(y.shape[1] for y in outputs) if order is None else order.shape[0]
    return outputs[0].new_empty(outputs[0].shape[0], width)


# Hidden from the compiler, which would make code for every mix of ranks: 0.5 s of a start each (docs/dev/log.md).
register_op("joined", _join, _join_fake)


class FactoredGemms:
    """The GEMMs of a layer, and the order of its outputs in theirs.

    Args:
        shards: in the order of the layer's outputs.
        cut: the layer's tensor-parallel cut.
        tp_size: tensor-parallel ranks.
        dtype: of the activations; that of the weights if None, none of which is quantized then.
        activation: as of TritonGemms.
    """

    def __init__(
        self,
        shards: Sequence[Shard[Matrix]],
        cut: Cut = Cut.REPLICATED,
        tp_size: int = 1,
        dtype: torch.dtype | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.activation = activation
        dtype = dtype or _dtype_of(shards)
        blocks = tp_size if cut is Cut.ALL_GATHER_Z else 1
        # Low-rank shards come first: z, which a collective may complete, is then one contiguous block.
        low_rank = [i for i, shard in enumerate(shards) if shard.up is not None]
        downs: list[Matrix] = []
        widths: list[int] = []
        # Each shard's columns of s, after the collective.
        columns = [slice(0)] * len(shards)
        total = 0
        # One GEMM for each low-rank shard, with the columns of s that are its input.
        self.ups: list[tuple[Gemm, slice]] = []
        sources: dict[int, torch.Tensor] = {}
        for i in [*low_rank, *(i for i in range(len(shards)) if i not in low_rank)]:
            down, up, places = shards[i].down, shards[i].up, shards[i].places
            # Zero rows here and zero columns in the up factor, where the packed kernel needs a multiple.
            missing = 0
            if isinstance(up, torch.Tensor) and isinstance(down, torch.Tensor):
                missing = -len(down) % PACKED_IN if can_pack(down.dtype) else 0
                down = F.pad(down, (0, 0, 0, missing)) if missing else down
            downs.append(down)
            width = len(down)
            columns[i] = slice(total, total + width * (1 if up is None else blocks))
            total = columns[i].stop
            if up is not None:
                widths.append(width)
                wide = up if isinstance(up, QuantizedMatrix) else spread(up, blocks, width - missing, missing)
                self.ups.append((gemm(wide, dtype), columns[i]))
            if places is not None:
                column = columns[i].start + columns_of(-1 - places, width - missing, missing)
                sources[i] = torch.where(places < 0, -1 - column, places)
        # One, unless only some of the matrices are quantized.
        self.firsts = [gemm(matrix, dtype) for matrix in stacked(downs)]
        self.z_columns = sum(widths)
        self.collective = collective_of(cut, widths, tp_size)
        # The layer's outputs in order: a GEMM (0 is the first) and its columns.
        self.pieces = [
            (0, columns[i]) if shard.up is None else (1 + low_rank.index(i), slice(0, len(shard.up)))
            for i, shard in enumerate(shards)
        ]
        self.order = self._order(sources, total) if sources else None
        self.out = sum(p.stop - p.start for _, p in self.pieces) if self.order is None else len(self.order)

    def _order(self, sources: dict[int, torch.Tensor], total: int) -> torch.Tensor:
        """int64 [out], the column of each of the layer's outputs in the outputs of all GEMMs side by side.

        Args:
            sources: of each pivot form, as `Shard.places`, but with columns of s for components of z.
            total: columns of s.
        """
        heights = [piece.stop for index, piece in sorted(self.pieces, key=lambda piece: piece[0]) if index]
        starts = [total + sum(heights[:i]) for i in range(len(heights))]
        device = next(iter(sources.values())).device
        order = []
        for i, (index, piece) in enumerate(self.pieces):
            start = starts[index - 1] if index else 0
            rows = torch.arange(piece.start, piece.stop, device=device)
            place = sources.get(i, rows)
            order.append(torch.where(place < 0, -1 - place, start + place))
        return torch.cat(order)

    def refill(self, other: "FactoredGemms") -> None:
        """Copy another layer's weights into this one's storage, which captured graphs read.

        Args:
            other: no longer usable afterwards.

        Raises:
            ValueError: it has other sizes; nothing is copied.
        """
        mine, theirs = ([*one.firsts, *(up for up, _ in one.ups)] for one in (self, other))
        same = self.pieces == other.pieces and [c for _, c in self.ups] == [c for _, c in other.ups]
        same = same and [one.shapes() for one in mine] == [one.shapes() for one in theirs]
        if not same or (self.order is None) != (other.order is None):
            raise ValueError(OTHER_SIZES)
        for old, new in zip(mine, theirs, strict=True):
            old.refill(new)
        if self.order is not None and other.order is not None:
            self.order.copy_(other.order)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], or half of it after the activation."""
        y = self._outputs(x, bias)
        return y if self.activation is None else self.activation(y)

    def _outputs(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The packed kernel divides by the number of tokens. No graph runs, or should be traced, for none.
        if not torch.compiler.is_compiling() and len(x) == 0:
            return x.new_empty(0, self.out)
        if not self.ups and len(self.firsts) == 1:  # a dense MoE expert beside factored ones, or quantized alone
            return self.firsts[0](x, bias).contiguous()
        outputs = [first(x, None) for first in self.firsts]
        s = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self.collective is not None:
            z, dense = s[:, : self.z_columns], s[:, self.z_columns :]
            s = torch.cat([self.collective(z), dense], -1) if dense.shape[1] else self.collective(z)
        if len(self.pieces) == 1 and self.order is None:
            up, columns = self.ups[0]
            return up(s[:, columns], bias).contiguous()
        outputs = [s, *(up(s[:, columns], None) for up, columns in self.ups)]
        if self.order is None:
            outputs = [outputs[index][:, columns] for index, columns in self.pieces]
        join = torch.ops.pgsvd.joined if torch.compiler.is_compiling() else _join
        y = join(outputs, self.order)
        return y if bias is None else y.add_(bias)
