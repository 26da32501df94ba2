"""The calls of a model's layers: their arguments, what they return, and forward passes with other code instead."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.offline.model.batch import Batch


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


def hidden_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [windows, length, hidden] after a model's last layer; the LM head does not run.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        ids: int64 [windows, length].
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise StopForward(output[0] if isinstance(output, tuple | list) else output)

    handle = layers[-1].register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    except StopForward as stopped:
        return stopped.value
    finally:
        handle.remove()
    raise AssertionError("the model ended without its last layer")


def output_after(
    model: Any,
    layers: Sequence[nn.Module],
    batch: Batch,
    outputs: dict[int, torch.Tensor],
    returned: Mapping[int, int],
) -> Any:
    """The output of a model's forward pass in which given outputs replace its layers.

    Args:
        model: of transformers.
        layers: all of its layers.
        batch: the arguments of the forward pass.
        outputs: layer index -> its output [..., hidden]; outputs of other layers do not affect the result.
        returned: index of a tower's first layer -> `ModelSource.returned`, for the towers that the batch runs.

    Returns:
        The model's output object.
    """
    entries: dict[int, torch.Tensor] = {}

    def skip(index: int, *args: Any, **kwargs: Any) -> Any:
        start = max(start for start in returned if start <= index)
        first = entries.setdefault(start, hidden_of(args, kwargs))
        return in_format(outputs.get(index, first), returned[start])

    with replaced_forward(layers, skip):
        return model(**batch, **pass_options(model))


def logits_after(
    model: Any, layers: Sequence[nn.Module], ids: torch.Tensor, hidden: torch.Tensor, returned: int
) -> torch.Tensor:
    """Logits [windows, length, vocabulary] of text from the hidden states after a model's last layer.

    Args:
        model: of transformers.
        layers: all of its layers.
        ids: int64 [windows, length].
        hidden: [windows, length, hidden].
        returned: `ModelSource.returned` of the language model.
    """
    return output_after(model, layers, {"input_ids": ids}, {len(layers) - 1: hidden}, {0: returned}).logits
