"""Slices the factors of one layer for a tensor-parallel rank.

Column-parallel layers shard `weight_u` by output rows, row-parallel layers `weight_v` by input columns. The other
factor is replicated, or sharded as well at the cost of one more collective: see `Cut` and `CommPlan`. The pivot form is
sharded in the same way, with P for V, and with C and the pivots together for U.
"""

from collections.abc import Sequence

import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import other_rows
from pgsvd_vllm.kernels.quantized_matrix import Matrix


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
        tp_rank: this rank.
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
    """This rank's block of a down factor [r, in] sharded by rank rows; the last blocks are padded with zero rows."""
    here = -(-len(weight) // tp_size)
    block = weight[tp_rank * here : (tp_rank + 1) * here]
    return torch.cat([block, block.new_zeros(here - len(block), weight.shape[1])])


def take_rows(weight: torch.Tensor, cuts: Sequence[slice]) -> torch.Tensor:
    """The rows of `cuts`, in order; a view if they are one piece."""
    return weight[cuts[0]] if len(cuts) == 1 else torch.cat([weight[cut] for cut in cuts])


def by_kind(groups: int, each: int, head: int) -> torch.Tensor:
    """Row numbers of all queries, then keys, then values, int64, in a matrix that interleaves them by group.

    Args:
        groups: key/value heads.
        each: query heads of one.
        head: rows of a head.
    """
    rows = torch.arange(groups * (each + 2) * head).view(groups, each + 2, head)
    return torch.cat([part.flatten() for part in rows.split([each, 1, 1], 1)])


def pivot_rows(
    pivots: torch.Tensor, c: Matrix, cuts: Sequence[slice], order: torch.Tensor | None = None
) -> tuple[Matrix, torch.Tensor]:
    """This rank's share of a pivot form.

    Args:
        pivots: int [r], ascending.
        c: [out - r, r].
        cuts: this rank's rows of the whole matrix.
        order: int64 [out], the layer's order of the checkpoint's rows, if it has one of its own.

    Returns:
        This rank's rows of `c`, and the source of each of its output rows: i >= 0 is row i of those, -1 - j is
        component j of z.
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
