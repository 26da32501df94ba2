"""Runs a model layer by layer, one tower after the other.

Memory holds one layer and the hidden states of all batches, independent of the model's depth. Outputs that are used
outside their tower, such as those of a vision encoder's last layer, are kept as well.
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


class StopForward(Exception):
    """Raised by a hook to end a forward pass; `value` is the tensor at that point."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@contextlib.contextmanager
def _replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of every layer inside the context; `forward` gets the layer's index as first argument."""
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _OutputFormat:
    """Detects whether the layers of a tower return tensors or tuples, while their forwards are replaced.

    If a layer must return a tuple and returns a tensor, the model indexes it with [0] and the next layer gets one
    dimension less. From then on outputs are wrapped in tuples.

    Args:
        first: the hidden states before the tower.
    """

    def __init__(self, first: torch.Tensor) -> None:
        self.first = first
        self.in_tuples = False

    def wrap(self, value: torch.Tensor, hidden: torch.Tensor) -> Any:
        """An output in the tower's format; `hidden` is the input with which the model called the layer."""
        self.in_tuples = self.in_tuples or hidden.dim() < self.first.dim()
        return (value,) if self.in_tuples else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [windows, length, hidden] after a model's last layer; the LM head does not run.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        ids: int64 [windows, length].
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise StopForward(output[0] if isinstance(output, tuple) else output)

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
    starts: Sequence[int] = (),
) -> Any:
    """The output of a model's forward pass in which given outputs replace its layers.

    Args:
        model: of transformers.
        layers: all of its layers.
        batch: the arguments of the forward pass.
        outputs: layer index -> its output [..., hidden]; outputs of other layers do not affect the result.
        starts: indexes of the first layers of its towers if the batch runs several of them.

    Returns:
        The model's output object.
    """
    formats: list[_OutputFormat] = []

    def skip(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        if not formats or index in starts:  # text does not run the first towers
            formats.append(_OutputFormat(hidden))
        return formats[-1].wrap(outputs.get(index, formats[-1].first), hidden)

    with _replaced_forward(layers, skip):
        return model(**batch, **_options(model))


def logits_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [windows, length, vocabulary] of text from the hidden states after a model's last layer.

    Args:
        model: of transformers.
        layers: all of its layers.
        ids: int64 [windows, length].
        hidden: [windows, length, hidden].
    """
    return output_after(model, layers, {"input_ids": ids}, {len(layers) - 1: hidden}).logits


def _options(model: Any) -> dict[str, Any]:
    """The keyword arguments of every forward pass."""
    return {"use_cache": False} if model.can_generate() else {}


@dataclass
class Flow:
    """The hidden states of all batches at one point of a dense or factored model.

    Attributes:
        tower: index of the current tower's first layer; -1 before the first tower.
        members: numbers of the batches that run the current tower.
        hidden: their hidden states [..., hidden] before the next layer.
        kept: batch -> layer index -> its output, for layers whose outputs are used outside their tower.
    """

    tower: int = -1
    members: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    kept: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)


class LayerStream:
    """Runs batches through a model one layer at a time.

    Args:
        source: the model.
        batches: the arguments of its forward passes.
        device: that computes.
        dtype: of weights and activations.

    Attributes:
        flow: the dense model's hidden states.
        read: indexes of the layers whose outputs are used outside their tower.

    Raises:
        InputError: a tensor is missing or damaged, or the model does not run its layers in sequence.
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
        """The arguments of one forward pass, on the device; floating-point ones in the dtype."""
        found = {}
        for name, value in self.batches[number].items():
            found[name] = value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
        return found

    def enter(self, index: int, flow: Flow) -> None:
        """If layer `index` begins a tower, compute the hidden states before it from the kept outputs of earlier towers.

        Raises:
            InputError: the architecture is not supported.
        """
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
        """Keep the outputs of layer `index`, which `flow.hidden` holds, if they are used outside its tower."""
        if index in self.read:
            for number, hidden in zip(flow.members, flow.hidden, strict=True):
                flow.kept.setdefault(number, {})[index] = hidden

    def before(self, start: int, number: int, outputs: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """Hidden states before a tower; the other arguments of each of its layers are kept for `run`.

        Args:
            start: index of the tower's first layer.
            number: of the batch.
            outputs: layer index -> its output, for the layers in `read` of earlier towers.

        Returns:
            [..., hidden]; None if the batch does not run this tower, such as text and a vision encoder.

        Raises:
            InputError: the architecture is not supported.
        """
        span = self.source.span(start)
        seen: list[tuple[torch.Tensor, int]] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        formats: dict[int, _OutputFormat] = {}

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            if index >= span.stop:
                raise StopForward(hidden)
            tower = formats.setdefault(self.source.span(index).start, _OutputFormat(hidden))
            if index < start:
                return tower.wrap(outputs.get(index, tower.first), hidden)
            # A change in place keeps the address and increments the version.
            if seen and (hidden.data_ptr() != seen[0][0].data_ptr() or hidden._version != seen[0][1]):
                raise self._unsupported("between its layers the model changes the hidden states")
            seen.append((hidden, hidden._version))
            kwargs.pop("hidden_states", None)
            if any(isinstance(value, MutableMapping) for value in (*args[1:], *kwargs.values())):
                raise self._unsupported("its layers exchange more than hidden states")
            calls.append((args[1:], kwargs))
            if index == span.stop - 1:
                raise StopForward(hidden)
            return tower.wrap(tower.first, hidden)

        with _replaced_forward(self.source.layers, record), contextlib.suppress(StopForward):
            self.source.model(**self.batch(number), **_options(self.source.model))
        if not calls and self.source.reads_images:
            return None
        if len(calls) != len(span):
            path = self.source.tower(start).path
            raise self._unsupported(f"the model runs {len(calls)} of its {len(span)} layers in {path}")
        self._calls[start, self._call_key(number)] = calls
        return seen[0][0]

    def _unsupported(self, reason: str) -> InputError:
        """The error for an architecture that cannot run layer by layer."""
        advice = "; its language model can be compressed with text alone" if self.source.reads_images else ""
        return InputError(f"{self.source.folder}: {reason}: this architecture is not supported{advice}")

    def _call_key(self, number: int) -> Any:
        """The key of the layers' other arguments; batches of text of equal shape share them."""
        batch = self.batches[number]
        return batch["input_ids"].shape if set(batch) == {"input_ids"} else number

    def run(self, layer: nn.Module, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer.

        Args:
            layer: with its weights loaded.
            index: of the layer.
            number: of the batch.
            hidden: [..., hidden].

        Returns:
            [..., hidden], the layer's output.
        """
        span = self.source.span(index)
        args, kwargs = self._calls[span.start, self._call_key(number)][index - span.start]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def output(self, number: int, outputs: dict[int, torch.Tensor]) -> Any:
        """The model's output for a batch.

        Args:
            number: of the batch.
            outputs: layer index -> its output, for the layers in `read`.
        """
        return output_after(self.source.model, self.source.layers, self.batch(number), outputs, self._starts)

    def _find_read(self) -> set[int]:
        """Find the layers whose outputs are used by anything other than the next layer of their tower.

        The outputs of all layers are replaced by leaves of the autograd graph; those that get a gradient are used.

        Raises:
            InputError: the architecture is not supported.
        """
        leaves: dict[int, torch.Tensor] = {}
        entries: list[torch.Tensor] = []
        copies: dict[int, torch.Tensor] = {}
        formats: dict[int, _OutputFormat] = {}

        def cut(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            if index in leaves:
                raise self._unsupported(f"the model runs {self.source.tower(index).path} more than once")
            if any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*args[1:], *kwargs.values())):
                raise self._unsupported("its layers take outputs of other towers")
            if index in self._starts:
                entries.append(hidden)
            tower = formats.setdefault(self.source.span(index).start, _OutputFormat(hidden))
            like = tower.first
            if self.source.tower(index).name == PROJECTOR:  # the only layer that changes the shape
                with self.source.layer(index, self.device, self.dtype) as layer, torch.no_grad():
                    like = type(layer).forward(layer, *args, **kwargs)
            leaves[index] = torch.zeros_like(like).requires_grad_()
            # A copy, since the model may change hidden states in place, which a leaf refuses.
            copies[index] = leaves[index].clone()
            return tower.wrap(copies[index], hidden)

        head: Any = self.source.model.get_output_embeddings()
        if head is not None:  # it is not loaded
            head.forward = lambda x: x
        number = max(range(len(self.batches)), key=lambda i: len(self.batches[i]))
        try:
            with _replaced_forward(self.source.layers, cut), torch.enable_grad():
                output = self.source.model(**self.batch(number), **_options(self.source.model))
        finally:
            if head is not None:
                del head.forward
        ends = {span.stop - 1 for span in self.source.spans}
        if any(copy._version for index, copy in copies.items() if index not in ends):
            raise self._unsupported("between its layers the model changes the hidden states")
        results = [output.logits] if "logits" in output else [output.text_embeds, output.image_embeds]
        sums = [value.float().sum() for value in (*results, *entries) if value.requires_grad]
        torch.autograd.backward(sums)
        return {index for index, leaf in leaves.items() if leaf.grad is not None}
