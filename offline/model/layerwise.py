"""Runs a model layer by layer, one tower after the other.

Memory holds one layer and the hidden states of all batches, independent of the model's depth. Outputs that are used
outside their tower, such as those of a vision encoder's last layer, are kept as well.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves  # the tensors among any arguments

from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.model.batch import Batch, block_of
from pgsvd_vllm.offline.model.layer_calls import (
    Exchanged,
    StopForward,
    hidden_of,
    in_format,
    logits_after,
    output_after,
    own_copies,
    pass_options,
    replaced_forward,
)
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import LANGUAGE, PROJECTOR

# Tokens of the batch of text that shows how the model runs; a prime, which is no layer's width.
PROBE_TOKENS = 29
# Relative error up to which a change between layers is an addition, from the rounding of the sum alone.
ADDITIVE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}
# A layer's other arguments: positional ones after the hidden states, and those by name.
LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


def _depends(value: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether a tensor is computed from a leaf of the autograd graph."""
    if not value.requires_grad:
        return False
    return torch.autograd.grad(value.float().sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None


@dataclass
class Flow:
    """The hidden states of all batches at one point of a dense or factored model.

    Attributes:
        tower: index of the current tower's first layer; -1 before the first tower.
        members: numbers of the batches that run the current tower, block by block.
        hidden: their hidden states [..., hidden] before the next layer.
        kept: batch -> layer index -> its output, for layers whose outputs are used outside their tower.
        added: batch -> layer index -> what the model adds to its output before the next layer.
    """

    tower: int = -1
    members: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    kept: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    added: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)

    def blocks(self) -> Iterator[tuple[int, list[int]]]:
        """Each block of batches, and the places of its batches in `members`."""
        for block, places in itertools.groupby(range(len(self.members)), lambda i: block_of(self.members[i])):
            yield block, list(places)


@dataclass(frozen=True)
class Entry:
    """What a batch brings to a tower.

    Attributes:
        hidden: the hidden states [..., hidden] before the first layer.
        added: layer index -> what the model adds to its output before the next layer, such as the features of earlier
            vision layers in Qwen3-VL's language model.
    """

    hidden: torch.Tensor
    added: dict[int, torch.Tensor]


class LayerStream:
    """Runs batches through a model one layer at a time.

    Args:
        source: the model.
        batches: the arguments of its forward passes, by number where other processes run the others.
        device: that computes.
        dtype: of weights and activations.

    Attributes:
        batches: by number, block by block.
        flow: the dense model's hidden states.
        read: indexes of the layers whose outputs are used outside their tower.

    Raises:
        InputError: a tensor is missing or damaged, or the model does not run its layers in sequence.
    """

    def __init__(
        self,
        source: ModelSource,
        batches: Sequence[Batch] | Mapping[int, Batch],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self._calls: dict[tuple[int, Any], list[LayerCall]] = {}
        self._additive: set[int] = set()  # towers in which the model was seen to add between its layers, not more
        source.load_outer(device, dtype)
        numbered = batches if isinstance(batches, Mapping) else dict(enumerate(batches))
        self.batches = {number: numbered[number] for number in sorted(numbered, key=lambda n: (block_of(n), n))}
        self.read = self._find_read()
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
        for number in self.batches:
            with torch.no_grad():
                entry = self.before(index, number, flow.kept.get(number, {}))
            if entry is not None:
                flow.members.append(number)
                flow.hidden.append(entry.hidden)
                flow.added.setdefault(number, {}).update(entry.added)

    def leave(self, index: int, flow: Flow) -> None:
        """Turn the outputs of layer `index`, which `flow.hidden` holds, into the next layer's hidden states.

        The outputs are kept if they are used outside their tower.
        """
        for i, number in enumerate(flow.members):
            if index in self.read:
                flow.kept.setdefault(number, {})[index] = flow.hidden[i]
            if index in flow.added.get(number, {}):
                flow.hidden[i] = flow.hidden[i] + flow.added[number][index]

    def before(self, start: int, number: int, outputs: dict[int, torch.Tensor]) -> Entry | None:
        """What a batch brings to a tower; the other arguments of each of its layers are kept for `run`.

        Args:
            start: index of the tower's first layer.
            number: of the batch.
            outputs: layer index -> its output, for the layers in `read` of earlier towers.

        Returns:
            None if the batch does not run this tower, such as text and a vision encoder.

        Raises:
            InputError: the architecture is not supported.
        """
        span = self.source.span(start)
        entry, calls = self._enter(span, number, outputs, torch.zeros_like)
        if not calls and self.source.reads_images:
            return None
        if len(calls) != len(span):
            path = self.source.tower(start).path
            raise self.unsupported(f"the model runs {len(calls)} of its {len(span)} layers in {path}")
        assert entry is not None
        tokens, shape = self.batches[number]["input_ids"].shape, entry.hidden.shape
        if self.source.tower(start).name == LANGUAGE and shape[:2] != tokens:
            raise self.unsupported(f"its hidden states of {tuple(tokens)} tokens are {tuple(shape)}")
        if entry.added and start not in self._additive:
            self._check_additions(span, number, outputs, entry)
        self._calls[start, self._call_key(number)] = calls
        return entry

    def _enter(
        self,
        span: range,
        number: int,
        outputs: dict[int, torch.Tensor],
        output_like: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[Entry | None, list[LayerCall]]:
        """Run a batch up to the last layer of a tower.

        Args:
            span: the tower's layers.
            number: of the batch.
            outputs: as in `before`.
            output_like: makes the output of each of the tower's layers from the hidden states before the first one.

        Returns:
            What the batch brings, with the sum of additions and outputs in place of additions, and the layers' calls.
        """
        first: list[torch.Tensor] = []
        added: dict[int, torch.Tensor] = {}
        calls: list[LayerCall] = []
        entries: dict[int, torch.Tensor] = {}
        handed = torch.empty(0)

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal handed
            hidden = hidden_of(args, kwargs)
            if index >= span.stop:
                raise StopForward(hidden)
            tower = self.source.span(index).start
            entry = entries.setdefault(tower, hidden)
            if index < span.start:
                return in_format(outputs.get(index, entry), self.source.returned[tower])
            # A change in place keeps the address and increments the version.
            if not first:
                first.append(hidden)
            elif hidden.data_ptr() != handed.data_ptr() or hidden._version:
                added[index - 1] = hidden
            kwargs.pop("hidden_states", None)
            calls.append((args[1:], kwargs))
            if index == span.stop - 1:
                raise StopForward(hidden)
            handed = output_like(first[0].detach())
            return in_format(handed, self.source.returned[tower])

        with replaced_forward(self.source.layers, record), contextlib.suppress(StopForward):
            self.source.model(**self.batch(number), **pass_options(self.source.model))
        return (Entry(first[0], added) if first else None), calls

    @torch.no_grad()
    def _check_additions(self, span: range, number: int, outputs: dict[int, torch.Tensor], entry: Entry) -> None:
        """Refuse a model whose changes between its layers depend on the layers' outputs.

        The layers return the hidden states before the first one here, and returned zeros before.
        """
        with_outputs, _ = self._enter(span, number, outputs, torch.clone)
        assert with_outputs is not None
        for index, addition in entry.added.items():
            expected = (entry.hidden + addition).float()
            found = with_outputs.added.get(index, entry.hidden).float()
            error, size = (torch.linalg.vector_norm(x) for x in (found - expected, expected))
            if not error <= ADDITIVE[self.dtype] * size:
                raise self.unsupported("between its layers the model changes the hidden states")
        self._additive.add(span.start)

    def unsupported(self, reason: str) -> InputError:
        """The error for an architecture that cannot run layer by layer."""
        advice = "; its language model can be compressed with text alone" if self.source.reads_images else ""
        return InputError(f"{self.source.folder}: {reason}: this architecture is not supported{advice}")

    def _exchange(self, detail: str) -> InputError:
        """The error for layers that depend on more than the hidden states of the layer before them."""
        return self.unsupported(f"its layers exchange more than hidden states ({detail})")

    @contextlib.contextmanager
    def _expected(self, what: str) -> Iterator[None]:
        """Turn an error of the model's code, which runs here for the first time, into one that names the model."""
        try:
            yield
        except (PgsvdError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise self.unsupported(f"{what} ({type(e).__name__}: {str(e)[:200]})") from None

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
        try:
            output = layer(hidden, *own_copies(args), **own_copies(kwargs))
        except Exchanged as error:
            raise self._exchange(f"{self.source.paths[index]} looks for {error}") from None
        return output[0] if isinstance(output, tuple | list) else output

    def try_layer(self, layer: nn.Module, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer as `run` does, for the first time.

        Raises:
            InputError: the layer does not run, or returns no hidden states.
        """
        with self._expected(f"{self.source.paths[index]} does not run"):
            output = self.run(layer, index, number, hidden)
            if output.shape != hidden.shape and self.source.tower(index).name != PROJECTOR:
                raise ValueError(f"{tuple(hidden.shape)} becomes {tuple(output.shape)}")
        return output

    def output(self, number: int, outputs: dict[int, torch.Tensor]) -> Any:
        """The model's output for a batch.

        Args:
            number: of the batch.
            outputs: layer index -> its output, for the layers in `read`.
        """
        return output_after(self.source.model, self.source.layers, self.batch(number), outputs, self.source.returned)

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of text, as `logits_after`."""
        source = self.source
        return logits_after(source.model, source.layers, ids, hidden, source.returned[source.spans[-1].start])

    @torch.enable_grad()
    def _find_read(self) -> set[int]:
        """Find the layers whose outputs are used by anything other than the next layer of their tower.

        The outputs of all layers are replaced by leaves of the autograd graph; those that get a gradient are used.

        Raises:
            InputError: the architecture is not supported.
        """
        source = self.source
        leaves: dict[int, torch.Tensor] = {}
        entries: list[torch.Tensor] = []
        copies: dict[int, torch.Tensor] = {}
        others: dict[int, tuple[Any, ...]] = {}
        added_from: set[int] = set()

        def cut(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(args, kwargs)
            if index in leaves:
                raise self.unsupported(f"the model runs {source.tower(index).path} more than once")
            given = tree_leaves((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
            handed = {id(value) for value in tree_leaves(list(others.values())) if isinstance(value, torch.Tensor)}
            if any(isinstance(v, torch.Tensor) and (v.requires_grad or id(v) in handed) for v in given):
                raise self._exchange(f"{source.paths[index]} takes an output of another one")
            start = source.span(index).start
            like = hidden
            if index == start:
                entries.append(hidden)
                if start not in source.returned or source.tower(index).name == PROJECTOR:
                    like, others[start] = self._first_outputs(index, args, kwargs)
            elif hidden is not copies[index - 1] or hidden._version:
                before_tower = {i: leaf for i, leaf in leaves.items() if i < start}
                added_from.update(i for i, leaf in before_tower.items() if _depends(hidden, leaf))
            leaves[index] = torch.zeros_like(like).requires_grad_()
            # A copy, since the model may change hidden states in place, which a leaf refuses.
            copies[index] = leaves[index].clone()
            if others.get(start):
                return copies[index], *others[start]
            return in_format(copies[index], source.returned[start])

        def stop(hidden: torch.Tensor) -> Any:
            raise StopForward(hidden)

        head: Any = source.model.get_output_embeddings()
        if head is not None:  # it is not loaded
            head.forward = stop
        number = max(self.batches, key=lambda n: len(self.batches[n]))
        # A change in place increments the version, of tensors on the meta device as well.
        weights = [(name, weight, weight._version) for name, weight in source.model.named_parameters()]
        batch = self.batch(number)
        if set(batch) == {"input_ids"}:
            batch = {"input_ids": batch["input_ids"][:1, :PROBE_TOKENS]}
        try:
            with (
                self._expected("transformers' code of the model does not run with other layers in place of its own"),
                replaced_forward(source.layers, cut),
            ):
                output = source.model(**batch, **pass_options(source.model))
            results = [output.logits] if "logits" in output else [output.text_embeds, output.image_embeds]
        except StopForward as stopped:
            results = [stopped.value]
        finally:
            if head is not None:
                del head.forward
        changed = next((name for name, weight, version in weights if weight._version != version), None)
        if changed is not None:
            raise self.unsupported(f"the model changes {changed} while it runs")
        sums = [value.float().sum() for value in (*results, *entries) if value.requires_grad]
        torch.autograd.backward(sums)
        return added_from | {index for index, leaf in leaves.items() if leaf.grad is not None}

    def _first_outputs(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Run the first layer of a tower for its hidden states and the other values it returns; their number is kept.

        Args:
            index: of the layer, whose forward is replaced.
            args: of its call.
            kwargs: of its call.
        """
        with self.source.layer(index, self.device, self.dtype) as layer, torch.no_grad():
            output = type(layer).forward(layer, *own_copies(args), **own_copies(kwargs))
        several = isinstance(output, tuple | list)
        values = tuple(output) if several else (output,)
        if not isinstance(values[0], torch.Tensor):
            raise TypeError(f"{self.source.paths[index]} returns no hidden states first")
        self.source.returned[self.source.span(index).start] = len(values) if several else 0
        return values[0], values[1:]
