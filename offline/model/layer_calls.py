"""The calls of a model's layers: their arguments, what they return, and forward passes with other code instead."""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class StopForward(Exception):
    """Raised by a hook to end a forward pass; `value` is the tensor at that point."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@contextlib.contextmanager
def replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of every layer inside the context; `forward` gets the layer's index as first argument."""
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a layer; raises TypeError if there are none."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise TypeError("its layers take no hidden states first")
    return hidden


def in_format(hidden: torch.Tensor, values: int) -> Any:
    """Hidden states as a layer returns them: alone, or as the first of some values, of which the others are None."""
    return (hidden, *[None] * (values - 1)) if values else hidden


class Exchanged(Exception):
    """A layer looks for what another layer has written."""


class _Given(dict[Any, Any]):
    """A mapping as a layer gets it: a copy, in which it may not look for what another layer has written."""

    def __missing__(self, key: Any) -> Any:
        raise Exchanged(key)

    def __contains__(self, key: Any) -> bool:
        if not super().__contains__(key):
            raise Exchanged(key)
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        """The value, which must be there."""
        return self[key]


def own_copies(arguments: Any) -> Any:
    """A layer's arguments [tuple or dict] with its own copy of every mapping among them."""
    if isinstance(arguments, dict):
        return {key: _Given(v) if isinstance(v, MutableMapping) else v for key, v in arguments.items()}
    return tuple(_Given(v) if isinstance(v, MutableMapping) else v for v in arguments)


def pass_options(model: Any) -> dict[str, Any]:
    """The keyword arguments of every forward pass."""
    return {"use_cache": False} if model.can_generate() else {}
