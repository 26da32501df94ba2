"""The tensor-parallel cut of a factored layer: which factor is sharded, and which collective that needs."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.families import Split, may_run_on_side_stream
from pgsvd_vllm.format.schema import FactoredModule

# Bytes that a rank must save for one more collective. A small all-gather takes 5 to 10 microseconds over NVLink, in
# which an H100 reads 17 to 33 MB, and 20 over PCIe, in which an L4 reads 6 MB; the memory saved also holds requests.
COLLECTIVE_BYTES = 8 * 2**20
VARIABLE = "PGSVD_COLLECTIVE_BYTES"


class Cut(Enum):
    """The collective inside a layer, and the factors that the ranks can shard with it."""

    REPLICATED = "no collective; V (column-parallel) or U (row-parallel) is replicated"
    ALL_GATHER_Z = "column-parallel: V is sharded by rank rows, z is all-gathered"
    ALL_REDUCE_Z = "row-parallel: z is all-reduced instead of y, U is replicated"
    ALL_REDUCE_Z_GATHER_Y = "row-parallel: z is all-reduced, U is sharded by outputs, y is all-gathered"


@dataclass(frozen=True)
class ParallelLayer:
    """The properties of a linear layer that decide its cut.

    Attributes:
        name: of the layer, or of its first module in the checkpoint.
        split: how vLLM shards the layer.
        modules: the forms of its low-rank shards, in order; one for a row-parallel layer.
        in_features, out_features: of the whole layer.
        itemsize: bytes of an element.
        reduces_outputs: the layer itself all-reduces the outputs of a row-parallel layer.
        must_reduce_outputs: that all-reduce has to stay, since LoRA or a subclass adds to the outputs.
    """

    name: str
    split: Split
    modules: Sequence[FactoredModule]
    in_features: int
    out_features: int
    itemsize: int
    reduces_outputs: bool = True
    must_reduce_outputs: bool = False


def collective_bytes() -> int:
    """The bytes that one more collective must save.

    Raises:
        InputError: the environment variable is not a number of bytes.
    """
    given = os.environ.get(VARIABLE, str(COLLECTIVE_BYTES))
    if not given.isdecimal():
        raise InputError(f"{VARIABLE}={given}: must be a number of bytes, 0 or more (0: the least memory on a rank)")
    return int(given)


class CommPlan:
    """Chooses the cuts of a model's layers in their order: the least memory for no more traffic than dense.

    An all-reduce of z in place of the outputs sends less than a dense layer. The plan spends the difference first on
    all-gathers of z, which save the most memory per element sent, then on all-gathers of outputs.

    Traffic is counted in elements per token: with w ranks, an all-reduce sends 2 (w - 1) / w of its elements from
    each rank, an all-gather (w - 1) / w of its result. The common factor (w - 1) / w is left out.

    Args:
        least: bytes that a rank must save for one more collective.

    Attributes:
        dense: traffic of the layers so far if they were dense.
        sent: their traffic.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self.dense = self.sent = 0
        # The largest all-gather of z of one layer so far.
        self._gathering = 0
        self._is_checked = False

    def check_once(self, check: Callable[[int], None]) -> None:
        """Call `check(least)` before the first cut is chosen: all ranks have to choose the same cuts."""
        if not self._is_checked:
            check(self.least)
            self._is_checked = True

    def choose(self, layer: ParallelLayer, tp_size: int) -> Cut:
        """The cut of the model's next layer; the loader and `inspect --tp` both decide here."""
        # MoE experts run only on the tokens that choose them, shared experts possibly on a stream of their own: a
        # collective there could meet another one. vLLM shards the LM head by vocabulary.
        linear = all(module.kind == "linear" for module in layer.modules)
        if tp_size == 1 or not linear or may_run_on_side_stream(layer.name) or layer.split is Split.NONE:
            return Cut.REPLICATED
        if layer.split is Split.OUTPUTS:
            if any(module.schemes for module in layer.modules):
                return Cut.REPLICATED  # z would be quantized before the collective and after it
            ranks = [module.rank for module in layer.modules]
            return self.by_outputs(ranks, layer.in_features, tp_size, layer.itemsize)
        if not layer.reduces_outputs:
            return Cut.REPLICATED
        if layer.must_reduce_outputs or not layer.modules or layer.modules[0].schemes:
            self.reduced(layer.out_features)
            return Cut.REPLICATED
        module = layer.modules[0]
        rows = module.shapes(layer.out_features, layer.in_features)[module.matrices[1]][0]
        return self.by_inputs(module.rank, rows, layer.out_features, tp_size, layer.itemsize)

    def by_outputs(self, ranks: Sequence[int], columns: int, tp_size: int, itemsize: int) -> Cut:
        """The cut of a column-parallel layer.

        Args:
            ranks: of its low-rank shards.
            columns: its inputs.
            tp_size: tensor-parallel ranks.
            itemsize: bytes of an element.
        """
        here = sum(-(-rank // tp_size) for rank in ranks)
        self._gathering = max(self._gathering, here * tp_size)
        saved = (sum(ranks) - here) * columns * itemsize
        if not 0 < saved >= self.least or self.sent + here * tp_size > self.dense:
            return Cut.REPLICATED
        self.sent += here * tp_size
        return Cut.ALL_GATHER_Z

    def by_inputs(self, rank: int, rows: int, out: int, tp_size: int, itemsize: int) -> Cut:
        """The cut of a row-parallel layer whose outputs are all-reduced.

        Args:
            rank: of its weight.
            rows: of its up factor: outputs less pivots.
            out: its outputs.
            tp_size, itemsize: as of `by_outputs`.
        """
        if rank >= out:
            self.reduced(out)
            return Cut.REPLICATED
        self.dense += 2 * out
        self.sent += 2 * rank
        saved = (rows - rows // tp_size) * rank * itemsize
        # The layers of the next block need some of the traffic for their all-gathers of z.
        if out % tp_size or not 0 < saved >= self.least or self.sent + out + 2 * self._gathering > self.dense:
            return Cut.ALL_REDUCE_Z
        self.sent += out
        return Cut.ALL_REDUCE_Z_GATHER_Y

    def reduced(self, out: int) -> None:
        """Count a layer whose outputs are all-reduced as in a dense model."""
        self.dense += 2 * out
        self.sent += 2 * out
