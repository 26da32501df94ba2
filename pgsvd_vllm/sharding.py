"""How the factors of one layer are cut over tensor-parallel ranks.

Column-parallel layers cut `weight_u` by output rows and keep `weight_v` whole; row-parallel layers
cut `weight_v` by input columns and keep `weight_u` whole, so that the layer's own all-reduce over
the outputs sums the partial products. No collective is added to vLLM's.
"""

from collections.abc import Sequence

import torch

from pgsvd_vllm.errors import CheckpointError


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


def take_rows(weight: torch.Tensor, cuts: Sequence[slice]) -> torch.Tensor:
    """The rows of `cuts`, in order; a view where they are one piece."""
    return weight[cuts[0]] if len(cuts) == 1 else torch.cat([weight[cut] for cut in cuts])


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
