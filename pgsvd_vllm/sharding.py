"""How the factors of one layer are cut over tensor-parallel ranks.

Column-parallel layers cut `weight_u` by output rows, row-parallel layers `weight_v` by input columns. The other
factor lies whole on every rank, or is cut as well, for which the ranks exchange something more: see `Cut` and
`Traffic`. The pivot form is cut in the same way, with P for V, and with C and the pivots together for U.
"""

import os
from collections.abc import Sequence
from enum import Enum

import torch

from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.kernels.reference import other_rows

# Bytes that a rank must save for one more collective. A small all-gather takes 5 to 10 microseconds over NVLink, in
# which an H100 reads 17 to 33 MB, and 20 over PCIe, in which an L4 reads 6 MB; and what is saved is room for requests.
COLLECTIVE_BYTES = 8 * 2**20
VARIABLE = "PGSVD_COLLECTIVE_BYTES"


class Cut(Enum):
    """What the ranks exchange inside a layer, and what that allows to cut."""

    PLAIN = "nothing; V (outputs cut) or U (inputs cut) lies whole on every rank"
    GATHERED = "outputs cut: V is cut by rank rows, z gathered"
    REDUCED = "inputs cut: z is summed in place of the outputs, U whole"
    JOINED = "inputs cut: z is summed, U cut by outputs, these are gathered"


def collective_bytes() -> int:
    """The bytes that one more collective must save.

    Raises:
        InputError: the environment variable is no number of bytes.
    """
    given = os.environ.get(VARIABLE, str(COLLECTIVE_BYTES))
    if not given.isdecimal():
        raise InputError(f"{VARIABLE}={given}: must be a number of bytes, 0 or more (0: the least memory on a rank)")
    return int(given)


def runs_beside_others(name: str) -> bool:
    """Whether vLLM may run a layer of this name on a stream of its own, where its collective would meet others', or
    only where tokens choose it."""
    return any(part in name for part in ("shared_expert", "share_expert", "shared_mlp", ".experts."))


class Traffic:
    """Chooses the cuts of a model's layers in their order: the least memory for no more traffic than dense.

    Summing z where a dense layer sums its outputs sends less; what that spares is spent on gathering z where
    nothing was sent, which spares the most memory a number sent, and then on gathering outputs.

    Traffic is counted in numbers a token: of a sum over w ranks each sends 2 (w - 1) / w times what is summed, of
    a gathering (w - 1) / w times what comes together. The common factor is left out.

    Args:
        least: bytes that a rank must save for one more collective.

    Attributes:
        dense: what the layers seen so far would send if they were dense.
        sent: what they send.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self.dense = self.sent = 0
        # The most that gathering z of one layer costs.
        self._gathering = 0

    def by_outputs(self, ranks: Sequence[int], columns: int, workers: int, itemsize: int) -> Cut:
        """The cut of a layer whose outputs are cut.

        Args:
            ranks: of its low-rank shards.
            columns: its inputs.
            workers: ranks of tensor parallelism.
            itemsize: bytes of a number.
        """
        here = sum(-(-rank // workers) for rank in ranks)
        self._gathering = max(self._gathering, here * workers)
        saved = (sum(ranks) - here) * columns * itemsize
        if not 0 < saved >= self.least or self.sent + here * workers > self.dense:
            return Cut.PLAIN
        self.sent += here * workers
        return Cut.GATHERED

    def by_inputs(self, rank: int, rows: int, out: int, workers: int, itemsize: int) -> Cut:
        """The cut of a layer whose inputs are cut and whose outputs are summed.

        Args:
            rank: of its matrix.
            rows: of its up factor: outputs less pivots.
            out: its outputs.
            workers, itemsize: as of `by_outputs`.
        """
        if rank >= out:
            self.summed(out)
            return Cut.PLAIN
        self.dense += 2 * out
        self.sent += 2 * rank
        saved = (rows - rows // workers) * rank * itemsize
        # The layers of the next block must find something left.
        if out % workers or not 0 < saved >= self.least or self.sent + out + 2 * self._gathering > self.dense:
            return Cut.REDUCED
        self.sent += out
        return Cut.JOINED

    def summed(self, out: int) -> None:
        """Count a layer whose outputs are summed as they would be if it were dense."""
        self.dense += 2 * out
        self.sent += 2 * out


def input_columns(size: int, size_per_partition: int, tp_rank: int) -> slice:
    """The input columns of this rank: all of them unless the layer is row-parallel."""
    if size == size_per_partition:
        return slice(0, size)
    return slice(tp_rank * size_per_partition, (tp_rank + 1) * size_per_partition)


def output_rows(rows: int, partitions: Sequence[int], tp_rank: int, tp_size: int, replicas: int) -> list[slice]:
    """The output rows of this rank in a matrix that covers one or more partitions.

    Args:
        rows: rows of the whole matrix in the checkpoint.
        partitions: rows this rank holds of each partition the matrix covers, in order. A matrix
            fused in the checkpoint covers several.
        tp_rank: this worker's rank.
        tp_size: number of ranks.
        replicas: ranks that share one copy of the rows (key/value heads fewer than ranks).

    Raises:
        ValueError: the rows do not divide as the layer expects.
    """
    if rows == sum(partitions):
        return [slice(0, rows)]
    shares = tp_size // replicas
    if rows != sum(partitions) * shares:
        raise ValueError(f"{rows} rows cannot be cut into {shares} shares of {sum(partitions)}")
    cuts, start, index = [], 0, tp_rank // replicas
    for size in partitions:
        cuts.append(slice(start + index * size, start + (index + 1) * size))
        start += size * shares
    return cuts


def rank_rows(weight: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's block of a down factor [r, in] that is cut by rank rows; the last ones end in rows of zeros."""
    here = -(-len(weight) // tp_size)
    block = weight[tp_rank * here : (tp_rank + 1) * here]
    return torch.cat([block, block.new_zeros(here - len(block), weight.shape[1])])


def take_rows(weight: torch.Tensor, cuts: Sequence[slice]) -> torch.Tensor:
    """The rows of `cuts`, in order; a view where they are one piece."""
    return weight[cuts[0]] if len(cuts) == 1 else torch.cat([weight[cut] for cut in cuts])


def by_kind(groups: int, each: int, head: int) -> torch.Tensor:
    """Rows of all queries, then keys, then values, int64, in a matrix that has them group by group.

    Args:
        groups: key/value heads.
        each: query heads of one.
        head: rows of a head.
    """
    rows = torch.arange(groups * (each + 2) * head).view(groups, each + 2, head)
    return torch.cat([part.flatten() for part in rows.split([each, 1, 1], 1)])


def pivot_rows(
    pivots: torch.Tensor, c: torch.Tensor, cuts: Sequence[slice], order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of a pivot form.

    Args:
        pivots: int [r], ascending.
        c: [out - r, r].
        cuts: this rank's rows of the whole matrix.
        order: int64 [out], of the matrix's rows, where the layer has them in another than the checkpoint.

    Returns:
        the rows of `c` that are this rank's, and for each of its output rows where it is found:
        i >= 0 is row i of those, and -1 - j is component j of z.
    """
    rows = len(pivots) + len(c)
    places = torch.empty(rows, dtype=torch.int64, device=c.device)
    others = other_rows(pivots, rows)
    places[pivots.long()] = -1 - torch.arange(len(pivots), device=c.device)
    places[others] = torch.arange(len(others), device=c.device)
    mine = take_rows(places if order is None else places[order.to(places.device)], cuts)
    kept = mine >= 0
    own = c[mine[kept]]
    mine[kept] = torch.arange(len(own), device=c.device)
    return own, mine


def copy_checked(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copy a factor into its place.

    Raises:
        CheckpointError: the shapes differ; names the tensor.
    """
    if target.shape != source.shape:
        raise CheckpointError(
            f"tensor {name}: this layer needs shape {tuple(target.shape)}, the checkpoint has {tuple(source.shape)}"
        )
    target.copy_(source)
