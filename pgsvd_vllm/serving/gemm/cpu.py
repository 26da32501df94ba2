"""The matrix products of one loaded layer, whatever mix of ranks and forms its shards have.

All that reads the layer's input is one product: s = x [V_1; P_2; W_3; ...]^T, over the down factors of
the low-rank shards and the weights of the dense ones. Every low-rank shard has one more, of its part
of s. The outputs are then put together in one pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from vllm.utils.torch_utils import direct_register_custom_op

from pgsvd_vllm.kernels.padding import columns_of, spread
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.collectives import collective_of
from pgsvd_vllm.serving.vllm_compat import PACKED_IN, PACKED_INPUTS, Run, can_pack, packed_gemm, vllm_gemm


def gemm(weight: torch.Tensor) -> Run:
    """x [tokens, in], bias [out] or None -> x @ weight.T (+ bias) [tokens, out], by what suits a factor.

    Args:
        weight: [out, in]; not kept where it is packed.
    """
    if not len(weight):  # all of a shard's rows on this rank are pivots
        return lambda x, bias: F.linear(x, weight)
    inputs = weight.shape[1]
    suits = inputs <= PACKED_INPUTS and inputs % PACKED_IN == 0 and can_pack(weight.dtype)
    return packed_gemm(weight) if suits else vllm_gemm(weight)


def _join(outputs: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    y = torch.cat(outputs, dim=-1)
    # Not index_select: on CPU, along the last dimension, it takes five times as long.
    return y if order is None else y.gather(1, order.expand(len(y), -1))


def _join_fake(outputs: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    width = sum(y.shape[1] for y in outputs) if order is None else order.shape[0]
    return outputs[0].new_empty(outputs[0].shape[0], width)


# Hidden from the compiler, which would make code for every mix of ranks: half a second of a start each (docs/log.md).
_library = torch.library.Library("pgsvd", "FRAGMENT")


direct_register_custom_op("joined", _join, fake_impl=_join_fake, target_lib=_library)


class FactoredGemms:
    """The products of a layer, and how its outputs are put together from them.

    Args, one entry a shard, in the order of the layer's outputs:
        readers: what reads x: a down factor [r, in], or a dense weight [out, in].
        ups: what reads the down factor's output, [rows, r]; None for a dense shard.
        places: of the pivot form int64 [out], where each output is found: i >= 0 is row i of the up
            product, -1 - j is component j of the down product. None for other shards.

    and of the whole layer:
        cut: what ranks of tensor parallelism exchange. Where z is gathered, a down factor has this rank's rows,
            [ceil(r / workers), in].
        workers: those ranks.
    """

    def __init__(
        self,
        readers: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor | None],
        cut: Cut = Cut.REPLICATED,
        workers: int = 1,
    ) -> None:
        blocks = workers if cut is Cut.ALL_GATHER_Z else 1
        # Those of low rank first: what is exchanged lies side by side.
        low_rank = [i for i, up in enumerate(ups) if up is not None]
        stacked: list[torch.Tensor] = []
        widths: list[int] = []
        # Of each shard where it lies in s, all that read x give together, once that has been exchanged.
        read = [slice(0)] * len(readers)
        total = 0
        # One product each, with the columns of s that it reads.
        self.ups: list[tuple[Run, slice]] = []
        where: dict[int, torch.Tensor] = {}
        for i in [*low_rank, *(i for i in range(len(readers)) if i not in low_rank)]:
            reader, up = readers[i], ups[i]
            # Zero rows there and zero columns in the up product, where that wants a multiple.
            missing = -len(reader) % PACKED_IN if up is not None and can_pack(reader.dtype) else 0
            stacked.append(F.pad(reader, (0, 0, 0, missing)) if missing else reader)
            width = len(reader) + missing
            read[i] = slice(total, total + width * (1 if up is None else blocks))
            total = read[i].stop
            if up is not None:
                widths.append(width)
                self.ups.append((gemm(spread(up, blocks, len(reader), missing)), read[i]))
            if (place := places[i]) is not None:
                column = read[i].start + columns_of(-1 - place, len(reader), missing)
                where[i] = torch.where(place < 0, -1 - column, place)
        self.first = gemm(stacked[0] if len(stacked) == 1 else torch.cat(stacked))
        self.own = sum(widths)
        self.exchange = collective_of(cut, widths, workers)
        # The outputs in order: a product (0 is the first) and its columns.
        self.pieces = [
            (0, read[i]) if up is None else (1 + low_rank.index(i), slice(0, len(up))) for i, up in enumerate(ups)
        ]
        self.order = self._order(where, total) if where else None
        self.out = sum(p.stop - p.start for _, p in self.pieces) if self.order is None else len(self.order)

    def _order(self, where: dict[int, torch.Tensor], total: int) -> torch.Tensor:
        """int64 [out], where the layer's outputs lie in all products' outputs, one after the other.

        Args:
            where: of the pivot forms, as `places`, but with columns of s for components.
            total: columns of s.
        """
        heights = [piece.stop for product, piece in sorted(self.pieces, key=lambda piece: piece[0]) if product]
        starts = [total + sum(heights[:i]) for i in range(len(heights))]
        device = next(iter(where.values())).device
        order = []
        for i, (product, piece) in enumerate(self.pieces):
            start = starts[product - 1] if product else 0
            rows = torch.arange(piece.start, piece.stop, device=device)
            place = where.get(i, rows)
            order.append(torch.where(place < 0, -1 - place, start + place))
        return torch.cat(order)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        # The packed kernel divides by the number of tokens. No graph is ever run, or should be traced, for none.
        if not torch.compiler.is_compiling() and len(x) == 0:
            return x.new_empty(0, self.out)
        if not self.ups:  # an expert that is dense, among others that are not
            return self.first(x, bias).contiguous()
        s = self.first(x, None)
        if self.exchange is not None:
            z, dense = s[:, : self.own], s[:, self.own :]
            s = torch.cat([self.exchange(z), dense], -1) if dense.shape[1] else self.exchange(z)
        if len(self.pieces) == 1 and self.order is None:
            up, columns = self.ups[0]
            return up(s[:, columns], bias).contiguous()
        outputs = [s, *(up(s[:, columns], None) for up, columns in self.ups)]
        if self.order is None:
            outputs = [outputs[index][:, columns] for index, columns in self.pieces]
        join = torch.ops.pgsvd.joined if torch.compiler.is_compiling() else _join
        y = join(outputs, self.order)
        return y if bias is None else y.add_(bias)
