"""Tensor-parallel ranks simulated one after the other in one process: collectives are replayed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from pgsvd_vllm.serving import collectives
from pgsvd_vllm.serving.layers import linear

T = TypeVar("T")


class _Waiting(Exception):
    def __init__(self, kind: str, mine: torch.Tensor, dim: int) -> None:
        super().__init__(kind)
        self.kind, self.mine, self.dim = kind, mine, dim


class Ranks:
    """`size` ranks; a rank that needs the others is started again once all have come as far.

    Attributes:
        sent: elements that the last `each` sent: an all-reduce counts twice, an all-gather by its result; the common
            factor (size - 1) / size is left out.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = self.sent = self._count = 0
        self._results: list[torch.Tensor] = []

    def each(self, work: Callable[[int], T]) -> list[T]:
        """`work` of every rank."""
        self._results, self.sent = [], 0
        while True:
            waiting: list[_Waiting] = []
            done: list[T] = []
            for rank in range(self.size):
                self.rank, self._count = rank, 0
                try:
                    done.append(work(rank))
                except _Waiting as one:
                    waiting.append(one)
            if not waiting:
                return done
            assert not done, "only some ranks have a collective"
            assert len({(one.kind, one.mine.shape, one.dim) for one in waiting}) == 1
            parts = [one.mine for one in waiting]
            if waiting[0].kind == "sum":
                self._results.append(torch.stack(parts).sum(0))
                self.sent += 2 * parts[0].numel()
            else:
                self._results.append(torch.cat(parts, waiting[0].dim))
                self.sent += self._results[-1].numel()

    def _collective(self, kind: str, mine: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if self.size == 1:
            return mine
        # A GPU's collectives take the numbers as they lie.
        assert mine.is_contiguous()
        self._count += 1
        if self._count > len(self._results):
            raise _Waiting(kind, mine.clone(), dim % mine.dim())
        return self._results[self._count - 1].clone()

    @contextmanager
    def instead_of_vllms(self) -> Iterator[None]:
        """vLLM's layers take these ranks for the process's own."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (vllm_linear, collectives):
                patch.setattr(module, "tensor_model_parallel_all_reduce", lambda x: self._collective("sum", x))
            patch.setattr(
                collectives, "tensor_model_parallel_all_gather", lambda x, dim=-1: self._collective("gather", x, dim)
            )
            patch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: self.rank)
            for module in (vllm_linear, linear):
                patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: self.size)
            yield


def whole(outputs: Sequence[torch.Tensor], sizes: Sequence[int], replicas: Sequence[int]) -> torch.Tensor:
    """The outputs of a column-parallel layer, put together again.

    Args:
        outputs: of every rank [tokens, sum of sizes].
        sizes: a rank's outputs of each shard.
        replicas: ranks that have the same ones of each shard.
    """
    parts = [y.split(list(sizes), -1) for y in outputs]
    for index, copies in enumerate(replicas):
        for rank, part in enumerate(parts):
            assert torch.equal(part[index], parts[rank // copies * copies][index])
    return torch.cat([torch.cat([part[i] for part in parts[::copies]], -1) for i, copies in enumerate(replicas)], -1)
