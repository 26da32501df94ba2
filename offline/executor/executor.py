"""Runs the calibration samples and independent computations, here or in several processes.

The samples are shared by workers. Each has a shard: the object of a stage that runs its batches through the model. What
a stage sums over samples is summed in blocks of batches (`model.batch.block_of`), and the blocks' sums in their order,
so that every executor gives the same bits.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from pgsvd_vllm.offline.executor.worker import Function, Shard, Worker
from pgsvd_vllm.offline.model.batch import Batch, block_of
from pgsvd_vllm.offline.model.source import ModelSource

Result = TypeVar("Result")


class Sums(Protocol):
    """What a stage sums over a block of batches, or over all of them."""

    block: int

    def merge(self, other: Any) -> None:
        """Add the sums of another block."""


Total = TypeVar("Total", bound=Sums)


class Executor(Protocol):
    """Runs shards and functions; see `LocalExecutor` for what each method does.

    Attributes:
        is_local: whether shards run in this process.
    """

    is_local: bool

    def begin(self, shard: type[Shard], batches: Sequence[Batch], *arguments: Any) -> None:
        """Give every worker a new shard."""

    def end(self) -> None:
        """Free the shards after a stage."""

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of every shard before any other call, without waiting for it."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every shard and return the results."""

    def streams(self, method: str, *arguments: Any) -> list[Iterator[Any]]:
        """Call a method of every shard that yields, and return the iterators."""

    def map(self, function: Function[Result], items: Iterable[Any], shared: Any = None) -> Iterator[Result]:
        """Call a function for every item and yield the results in order."""

    def retry(self, stage: Callable[[], Result]) -> Result:
        """Run a stage, again where a worker is lost in it."""


class LocalExecutor:
    """One worker in this process.

    Args:
        source: the model.
        device: that computes.
        dtype: of weights and activations.
    """

    is_local = True

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.worker = Worker(source, device, dtype)

    def begin(self, shard: type[Shard], batches: Sequence[Batch], *arguments: Any) -> None:
        """Give the worker a new shard.

        Args:
            shard: its class.
            batches: of all samples.
            arguments: of the class, after the `LayerStream` of its batches.

        Raises:
            InputError: as of `LayerStream`.
        """
        self.worker.begin(shard, dict(enumerate(batches)), *arguments)

    def end(self) -> None:
        """Free the shard."""
        self.worker.end()

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of the shard, whose result does not matter."""
        self.worker.call(method, *arguments)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of all shards, that of the first block's shard first."""
        return [self.worker.call(method, *arguments)]

    def streams(self, method: str, *arguments: Any) -> list[Iterator[Any]]:
        """What a method of each shard yields: the tokens of a batch that is done, and the `Sums` of each block."""
        return [self.worker.stream(method, *arguments)]

    def map(self, function: Function[Result], items: Iterable[Any], shared: Any = None) -> Iterator[Result]:
        """Results of a function, in the order of the items.

        Args:
            function: of a module; gets the model, the device, an item and `shared`.
            items: each is taken once the one before is done.
            shared: by all items.
        """
        for item in items:
            yield self.worker.apply(function, item, shared)

    def retry(self, stage: Callable[[], Result]) -> Result:
        """The result of a stage, whose shard is freed; this process is never lost without the run."""
        try:
            return stage()
        finally:
            self.end()


def shares_of(batches: Sequence[Batch], workers: int) -> dict[int, dict[int, Batch]]:
    """Worker -> its batches by number, whole blocks of them; workers without a batch are missing."""
    shares: dict[int, dict[int, Batch]] = {}
    for number, batch in enumerate(batches):
        shares.setdefault(block_of(number) % workers, {})[number] = batch
    return dict(sorted(shares.items()))


def combined(streams: Sequence[Iterator[Any]], total: Total) -> Iterator[int | Total]:
    """Add up the sums of all blocks.

    Args:
        streams: of all shards; each yields its blocks in ascending order.
        total: zero.

    Yields:
        The tokens of each batch that is done, and at the end the total.
    """
    waiting: list[tuple[int, int, Total]] = []

    def next_block(number: int) -> Iterator[int]:
        for item in streams[number]:
            if not isinstance(item, int):
                heapq.heappush(waiting, (item.block, number, item))
                return
            yield item

    for number in range(len(streams)):
        yield from next_block(number)
    while waiting:
        _, number, sums = heapq.heappop(waiting)
        total.merge(sums)
        del sums  # it may have GBs
        yield from next_block(number)
    yield total
