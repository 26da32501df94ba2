"""What the ranks of tensor parallelism hand each other between a layer's two products, or after them."""

from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import RowParallelLinear, split_tensor_along_last_dim

from pgsvd_vllm.kernels.blocks import Exchange
from pgsvd_vllm.sharding import Cut


def sum_of(z: torch.Tensor) -> torch.Tensor:
    """z [tokens, r] of this rank's inputs -> of all inputs."""
    # NCCL takes the first numel numbers from where a tensor begins, whatever its strides.
    return tensor_model_parallel_all_reduce(z.contiguous())


class Gathering:
    """z of this rank's rank rows -> of all: for every shard the blocks of all ranks, side by side.

    Args:
        widths: columns of z that every shard has on each rank.
        workers: ranks.
    """

    def __init__(self, widths: Sequence[int], workers: int) -> None:
        self.widths = list(widths)
        self.workers = workers

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """[tokens, sum of widths] -> [tokens, workers * sum of widths]."""
        blocks = tensor_model_parallel_all_gather(z.contiguous(), 0).view(self.workers, len(z), z.shape[1])
        return torch.cat([part.movedim(0, 1).flatten(1) for part in blocks.split(self.widths, -1)], -1)


def exchange_of(cut: Cut, widths: Sequence[int], workers: int) -> Exchange | None:
    """What lies between the products of a layer; widths, workers: as of Gathering."""
    if cut is Cut.PLAIN:
        return None
    return Gathering(widths, workers) if cut is Cut.GATHERED else sum_of


def joined(y: torch.Tensor) -> torch.Tensor:
    """This rank's outputs [tokens, out / workers] -> all [tokens, out]."""
    return tensor_model_parallel_all_gather(y, -1)


class SummedInside(RowParallelLinear):
    """A row-parallel layer whose method hands out the whole sum, bias and all.

    A layer becomes one by its class alone. `reduce_results` stays true, as it is: models read it, and some clear it.
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, nn.Parameter | None]:
        """[..., in of this rank, or all] -> [..., out]."""
        x = input_
        if not self.input_is_parallel:
            x = split_tensor_along_last_dim(input_, num_partitions=self.tp_size)[self.tp_rank].contiguous()
        y = self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)
        if not self.reduce_results and self.tp_rank:
            # Cleared after the layer was made: the model sums what the ranks hand out.
            y = torch.zeros_like(y)
        if not self.return_bias:
            return y
        return y, self.bias if self.skip_bias_add else None
