"""What the ranks of tensor parallelism hand each other between a layer's two products, or after them."""

from collections.abc import Sequence

import torch
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.parallel.comm_plan import Cut


def all_reduce_z(z: torch.Tensor) -> torch.Tensor:
    """z [tokens, r] of this rank's inputs -> of all inputs."""
    # NCCL takes the first numel numbers from where a tensor begins, whatever its strides.
    return tensor_model_parallel_all_reduce(z.contiguous())


class AllGatherZ:
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


def collective_of(cut: Cut, widths: Sequence[int], workers: int) -> Collective | None:
    """What lies between the products of a layer; widths, workers: as of AllGatherZ."""
    if cut is Cut.REPLICATED:
        return None
    return AllGatherZ(widths, workers) if cut is Cut.ALL_GATHER_Z else all_reduce_z


def joined(y: torch.Tensor) -> torch.Tensor:
    """This rank's outputs [tokens, out / workers] -> all [tokens, out]."""
    return tensor_model_parallel_all_gather(y, -1)
