"""Runs a model layer by layer, one tower after the other.

Memory holds one layer and the hidden states of all batches, whatever the depth; of layers whose outputs are read
outside of their tower, such as the last one of a vision encoder, the outputs are kept as well.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import PROJECTOR


class Reached(Exception):
    """Raised by a hook to end a forward at the module whose input or output was wanted."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@contextlib.contextmanager
def _replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer's forward replaced for a while; `forward` is also told the layer's index."""
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Taker:
    """Gives a tower's layers' outputs in the form in which the model takes them.

    Args:
        first: the hidden states before the tower.
    """

    def __init__(self, first: torch.Tensor) -> None:
        self.first = first
        self.in_tuples = False

    def give(self, value: torch.Tensor, arrived: torch.Tensor) -> Any:
        """`value`; in a tuple, once the model has taken the first of what a layer gave it, as what `arrived` shows."""
        self.in_tuples = self.in_tuples or arrived.dim() < self.first.dim()
        return (value,) if self.in_tuples else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def hidden_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [windows, length, hidden] after a model's last layer; its head does not run.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        ids: int64 [windows, length].
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise Reached(output[0] if isinstance(output, tuple) else output)

    handle = layers[-1].register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    except Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise AssertionError("the model ended without its last layer")


def output_after(
    model: Any,
    layers: Sequence[nn.Module],
    batch: Batch,
    outputs: dict[int, torch.Tensor],
    starts: Sequence[int] = (),
) -> Any:
    """What a model makes of the outputs of its layers, which are not run.

    Args:
        model: of transformers.
        layers: all of its layers.
        batch: the arguments behind the outputs.
        outputs: index of a layer -> its output; of other layers nobody reads it but the next one.
        starts: indexes of the layers at which its towers begin, where the batch runs several.
    """
    takers: list[_Taker] = []

    def skip(index: int, *args: Any, **kwargs: Any) -> Any:
        arrived = _hidden(args, kwargs)
        if not takers or index in starts:  # text does not run the first towers
            takers.append(_Taker(arrived))
        return takers[-1].give(outputs.get(index, takers[-1].first), arrived)

    with _replaced_forward(layers, skip):
        return model(**batch, **_options(model))


def logits_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [windows, length, vocabulary] of text from the hidden states after a model's last layer.

    Args: as of `output_after`; `ids` are int64 [windows, length], `hidden` [windows, length, hidden].
    """
    return output_after(model, layers, {"input_ids": ids}, {len(layers) - 1: hidden}).logits


def _options(model: Any) -> dict[str, Any]:
    """Arguments of every call."""
    return {"use_cache": False} if model.can_generate() else {}


@dataclass
class Flow:
    """Hidden states on their way through a model, dense or factored.

    Attributes:
        tower: index of its first layer; -1 before any.
        members: the batches, by number, that run the current tower.
        hidden: theirs, before its next layer.
        kept: batch -> index of a layer -> its output, of layers read outside of their tower.
    """

    tower: int = -1
    members: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    kept: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)


class LayerStream:
    """Runs batches through a model one layer at a time.

    Args:
        source: the model.
        batches: the arguments of its calls.
        device: where to compute.
        dtype: of weights and activations.

    Attributes:
        flow: the dense model's hidden states.
        read: the layers, by index, whose outputs are read outside of their tower.

    Raises:
        InputError: from `ModelSource`; also where the model does not run its layers one after the other.
    """

    def __init__(self, source: ModelSource, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self._starts = [span.start for span in source.spans]
        self._calls: dict[tuple[int, Any], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        source.load_outer(device, dtype)
        self.batches = list(batches)
        self.read = {len(source.layers) - 1} if not source.reads_images else self._find_read()
        self.flow = Flow()
        self.enter(0, self.flow)

    def batch(self, number: int) -> Batch:
        """The arguments of one call, on the device, in the dtype."""
        found = {}
        for name, value in self.batches[number].items():
            found[name] = value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
        return found

    def enter(self, index: int, flow: Flow) -> None:
        """Where a tower begins at layer `index`, make the hidden states before it from those of the towers before."""
        if index != self.source.span(index).start or index == flow.tower:
            return
        flow.tower, flow.members, flow.hidden = index, [], []
        for number in range(len(self.batches)):
            with torch.no_grad():
                first = self.before(index, number, flow.kept.get(number, {}))
            if first is not None:
                flow.members.append(number)
                flow.hidden.append(first)

    def leave(self, index: int, flow: Flow) -> None:
        """Keep the outputs of layer `index`, which `flow.hidden` holds, if they are read outside of its tower."""
        if index in self.read:
            for number, hidden in zip(flow.members, flow.hidden, strict=True):
                flow.kept.setdefault(number, {})[index] = hidden

    def before(self, start: int, number: int, outputs: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """Hidden states before a tower; remembers what each of its layers is called with.

        Args:
            start: index of the tower's first layer.
            number: of the batch.
            outputs: index of a layer of towers before -> its output, of those that are read outside of their tower.

        Returns:
            [..., hidden]; None where the batch does not run this tower, such as text a vision encoder.
        """
        span = self.source.span(start)
        seen: list[tuple[torch.Tensor, int]] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        takers: dict[int, _Taker] = {}

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            if index >= span.stop:
                raise Reached(hidden)
            taker = takers.setdefault(self.source.span(index).start, _Taker(hidden))
            if index < start:
                return taker.give(outputs.get(index, taker.first), hidden)
            # A change in place keeps the address and counts the version up.
            if seen and (hidden.data_ptr() != seen[0][0].data_ptr() or hidden._version != seen[0][1]):
                raise self._unsupported("between its layers the model changes the hidden states")
            seen.append((hidden, hidden._version))
            kwargs.pop("hidden_states", None)
            if any(isinstance(value, MutableMapping) for value in (*args[1:], *kwargs.values())):
                raise self._unsupported("its layers hand each other more than hidden states")
            calls.append((args[1:], kwargs))
            if index == span.stop - 1:
                raise Reached(hidden)
            return taker.give(taker.first, hidden)

        with _replaced_forward(self.source.layers, record), contextlib.suppress(Reached):
            self.source.model(**self.batch(number), **_options(self.source.model))
        if not calls and self.source.reads_images:
            return None
        if len(calls) != len(span):
            path = self.source.tower(start).path
            raise self._unsupported(f"the model runs {len(calls)} of its {len(span)} layers in {path}")
        self._calls[start, self._call_key(number)] = calls
        return seen[0][0]

    def _unsupported(self, what: str) -> InputError:
        text = "; its language model may be compressed with text alone" if self.source.reads_images else ""
        return InputError(f"{self.source.folder}: {what}: this architecture is not supported{text}")

    def _call_key(self, number: int) -> Any:
        """What the layers' other arguments depend on: batches of text share theirs."""
        batch = self.batches[number]
        return batch["input_ids"].shape if set(batch) == {"input_ids"} else number

    def run(self, layer: nn.Module, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of layer `index` for hidden states of batch `number`."""
        span = self.source.span(index)
        args, kwargs = self._calls[span.start, self._call_key(number)][index - span.start]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def output(self, number: int, outputs: dict[int, torch.Tensor]) -> Any:
        """What the model makes of a batch, from the outputs of layers that are read outside of their tower."""
        return output_after(self.source.model, self.source.layers, self.batch(number), outputs, self._starts)

    def _find_read(self) -> set[int]:
        """The layers that something else than the next layer of their tower reads: gradients tell."""
        leaves: dict[int, torch.Tensor] = {}
        entries: list[torch.Tensor] = []
        takers: dict[int, _Taker] = {}

        def cut(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            if index in leaves:
                raise self._unsupported(f"the model runs {self.source.tower(index).path} more than once")
            if any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*args[1:], *kwargs.values())):
                raise self._unsupported("towers read each other's outputs inside their layers")
            if index in self._starts:
                entries.append(hidden)
            taker = takers.setdefault(self.source.span(index).start, _Taker(hidden))
            like = taker.first
            if self.source.tower(index).name == PROJECTOR:  # the only layer that changes the shape
                with self.source.layer(index, self.device, self.dtype) as layer, torch.no_grad():
                    like = type(layer).forward(layer, *args, **kwargs)
            leaves[index] = torch.zeros_like(like).requires_grad_()
            return taker.give(leaves[index], hidden)

        head: Any = self.source.model.get_output_embeddings()
        if head is not None:  # not loaded, and it would only multiply
            head.forward = lambda x: x
        number = max(range(len(self.batches)), key=lambda i: len(self.batches[i]))
        try:
            with _replaced_forward(self.source.layers, cut), torch.enable_grad():
                output = self.source.model(**self.batch(number), **_options(self.source.model))
        finally:
            if head is not None:
                del head.forward
        results = [output.logits] if "logits" in output else [output.text_embeds, output.image_embeds]
        wanted = [value.float().sum() for value in (*results, *entries) if value.requires_grad]
        torch.autograd.backward(wanted)
        return {index for index, leaf in leaves.items() if leaf.grad is not None}
