"""What one process does for an executor: it runs a share of the calibration samples, and functions."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch

from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.free_memory import give_back
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource

Result = TypeVar("Result")
# A computation on the model's weights, apart from the samples, from the model, the device, an item, and what all items
# share.
Function = Callable[[ModelSource, torch.device, Any, Any], Result]


class Shard(Protocol):
    """The part of a stage that runs batches through the model, and whose methods executors call by name."""

    def __init__(self, stream: LayerStream, *arguments: Any) -> None: ...

    def close(self) -> None:
        """Release what the end of the process would not."""


class Worker:
    """Runs a shard.

    Args:
        source: the model.
        device: that computes.
        dtype: of weights and activations.
    """

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.shard: Any = None

    def begin(self, shard: type[Shard], batches: Mapping[int, Batch], *arguments: Any) -> None:
        """Replace the shard; raises InputError as `LayerStream`."""
        self.end()
        stream = LayerStream(self.source, batches, self.device, self.dtype)
        self.shard = shard(stream, *arguments)

    def end(self) -> None:
        """Close and free the shard, its hidden states above all."""
        if self.shard is not None:
            self.shard.close()
        self.shard = None
        give_back()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the shard."""
        return getattr(self.shard, method)(*arguments)

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What a method of the shard yields."""
        yield from getattr(self.shard, method)(*arguments)

    def apply(self, function: Function[Any], item: Any, shared: Any) -> Any:
        """The result of a function for an item."""
        return function(self.source, self.device, item, shared)
