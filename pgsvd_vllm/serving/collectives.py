"""The tensor-parallel collectives between a layer's two GEMMs, or after them."""

from collections.abc import Sequence

import torch
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tp_group

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.parallel.comm_plan import VARIABLE, Cut
from pgsvd_vllm.serving.graph_sizes import VARIABLE as GRAPH_TOKENS
from pgsvd_vllm.serving.graph_sizes import graph_tokens


def all_reduce_z(z: torch.Tensor) -> torch.Tensor:
    """z [tokens, r] over this rank's inputs -> z over all inputs."""
    # NCCL takes the first numel elements from where a tensor begins, whatever its strides.
    return tensor_model_parallel_all_reduce(z.contiguous())


class AllGatherZ:
    """z of this rank's rank rows -> z of all rank rows: for each shard, the ranks' blocks side by side.

    Args:
        widths: columns of z that each shard has on one rank.
        tp_size: tensor-parallel ranks.
    """

    def __init__(self, widths: Sequence[int], tp_size: int) -> None:
        self.widths = list(widths)
        self.tp_size = tp_size

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """[tokens, sum of widths] -> [tokens, tp_size * sum of widths]."""
        blocks = tensor_model_parallel_all_gather(z.contiguous(), 0).view(self.tp_size, len(z), z.shape[1])
        return torch.cat([part.movedim(0, 1).flatten(1) for part in blocks.split(self.widths, -1)], -1)


def collective_of(cut: Cut, widths: Sequence[int], tp_size: int) -> Collective | None:
    """The collective on z between a layer's GEMMs, if its cut has one; widths, tp_size: as of AllGatherZ."""
    if cut is Cut.REPLICATED:
        return None
    return AllGatherZ(widths, tp_size) if cut is Cut.ALL_GATHER_Z else all_reduce_z


def all_gather_y(y: torch.Tensor) -> torch.Tensor:
    """This rank's outputs [tokens, out / tp_size] -> all outputs [tokens, out]."""
    return tensor_model_parallel_all_gather(y, -1)


def check_equal_on_all_ranks(collective_bytes: int) -> None:
    """Compare the variables of all tensor-parallel ranks; every rank of the group has to call this.

    Ranks with other PGSVD_COLLECTIVE_BYTES would choose other cuts, and wait for each other's collectives for ever;
    ranks with other PGSVD_GRAPH_TOKENS would pad batches to other sizes.

    Raises:
        InputError: the values differ; raised on every rank.
    """
    group = get_tp_group()
    mine = {VARIABLE: collective_bytes, GRAPH_TOKENS: graph_tokens()}
    all_ranks: list[dict[str, int]] = [mine] * group.world_size
    torch.distributed.all_gather_object(all_ranks, mine, group=group.cpu_group)
    for name in mine:
        values = [each[name] for each in all_ranks]
        if len(set(values)) > 1:
            found = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise InputError(f"{name} differs between tensor-parallel ranks: {found}; set the same value everywhere")
