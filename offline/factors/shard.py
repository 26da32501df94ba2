"""The part of the error-aware fit that runs samples through the dense and the factored model (see `error_aware`)."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.calibration.gram import by_window, token_scale
from pgsvd_vllm.offline.factors.layer_passes import (
    DenseActivations,
    PausedForward,
    RepeatedForward,
    keep_output,
    other_tokens,
    pause_before,
    remove,
    repeater,
)
from pgsvd_vllm.offline.linalg import CrossSum, GramSum
from pgsvd_vllm.offline.model.batch import block_of
from pgsvd_vllm.offline.model.layerwise import Flow, LayerStream

# Largest deviation of a layer's output from its input plus its writers' outputs, relative to the change by the layer.
ADDITIVE = 0.02


@dataclass
class TargetSums:
    """What the target of a projection follows from, over a block of batches or over all.

    Attributes:
        gram: C' = sum x' x'^T.
        cross: D = sum x x'^T.
        dense: C = sum x x^T; None where it is known already.
        stream: R = sum e x'^T; None for a projection that does not add to the residual stream.
        tokens: in the sums.
        own: energy of the projection's own outputs; 0 without `stream`.
        block: of the batches.
    """

    gram: GramSum
    cross: CrossSum
    dense: GramSum | None
    stream: CrossSum | None
    tokens: int = 0
    own: float = 0.0
    block: int = 0

    @classmethod
    def zero(
        cls, out: int, width: int, with_dense: bool, with_stream: bool, device: torch.device | None = None
    ) -> "TargetSums":
        """Zero, for a projection [out, width]."""
        return cls(
            GramSum(width, device),
            CrossSum(width, width, device),
            GramSum(width, device) if with_dense else None,
            CrossSum(out, width, device) if with_stream else None,
        )

    def merge(self, other: "TargetSums") -> None:
        """Add the sums of another block."""
        self.gram.merge(other.gram)
        self.cross.merge(other.cross)
        if self.dense is not None and other.dense is not None:
            self.dense.merge(other.dense)
        if self.stream is not None and other.stream is not None:
            self.stream.merge(other.stream)
        self.tokens += other.tokens
        self.own += other.own


class FitShard:
    """A share of the samples during the error-aware fit.

    For each layer call `width`, `open` and `start`, then `sums` for each group of projections and `set_weight` for each
    projection, and `finish`. Weights that are known before may be set before `start`.

    Args:
        stream: that has run no layer yet; its flow holds the dense hidden states.
        all_tokens: whether all shards together have all calibration tokens, whose C is known from calibration.
        kept_tokens: whose activations inside of a layer stay in memory; those of the first batch always do. None for
            all. The forward passes of the others are repeated for each projection.

    Attributes:
        dense: the flow of the dense model.
        factored: that of the factored one.
    """

    def __init__(self, stream: LayerStream, all_tokens: bool, kept_tokens: int | None) -> None:
        self.stream = stream
        self.all_tokens = all_tokens
        self.kept_tokens = kept_tokens
        self.dense = stream.flow
        self.factored = Flow(stream.flow.tower, list(stream.flow.members), list(stream.flow.hidden))
        self._opened = contextlib.ExitStack()

    @torch.no_grad()
    def open(
        self, index: int, paths: Mapping[str, str], leaders: Sequence[str], candidates: Sequence[str]
    ) -> tuple[tuple[int, int], list[str]] | None:
        """Load a layer and run its dense version.

        Args:
            index: of the layer.
            paths: projection -> module path.
            leaders: projections whose inputs are needed, the first ones of their groups.
            candidates: projections that may add to the residual stream.

        Returns:
            The block and number of the first batch, and the candidates if the layer's output equals its input plus
            their outputs there, else an empty list; None without batches.
        """
        self._opened.close()  # a layer that was not finished
        self._index, self._leaders = index, leaders
        self._layer = self._opened.enter_context(self.stream.source.layer(index, self.stream.device, self.stream.dtype))
        prefix = f"{self.stream.source.paths[index]}."
        self._modules: dict[str, Any] = {
            name: self._layer.get_submodule(path.removeprefix(prefix)) for name, path in paths.items()
        }
        self._kept = self._kept_batches()
        self._activations = self._run_dense(leaders, candidates)
        if not self.dense.members:
            return None
        number = self.dense.members[0]
        return (block_of(number), number), self._writers(candidates)

    @property
    def _width(self) -> int:
        """Width of the residual stream; 0 if no batch runs the tower."""
        return self.dense.hidden[0].shape[-1] if self.dense.hidden else 0

    def width(self, index: int) -> int:
        """Width of the residual stream before layer `index`, which is entered; 0 if no batch runs the tower."""
        for flow in (self.dense, self.factored):
            self.stream.enter(index, flow)
        return self._width

    def close(self) -> None:
        """Release a layer that was not finished, with its hooks."""
        self._opened.close()

    def _kept_batches(self) -> int:
        """The number of batches whose activations inside of a layer stay in memory, the first ones."""
        if self.kept_tokens is None:
            return len(self.dense.members)
        tokens = itertools.accumulate(hidden.shape[:-1].numel() for hidden in self.dense.hidden)
        return max(1, sum(total <= self.kept_tokens for total in tokens))

    def _run_dense(self, inputs: Sequence[str], outputs: Sequence[str]) -> DenseActivations:
        """Run the dense layer and keep the inputs and outputs of some projections in some batches on the CPU."""
        layer, index, modules = self._layer, self._index, self._modules
        hidden = list(self.dense.hidden)

        def collect_input(tensors: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _module, args, _output: tensors.append(args[0].cpu())

        def collect_output(tensors: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _module, _args, output: tensors.append(output.cpu())

        repeat = None
        if inputs and self._kept < len(hidden):

            def run(dense_layer: nn.Module, i: int) -> torch.Tensor:
                return self.stream.run(dense_layer, index, self.dense.members[i], hidden[i])

            repeat = repeater(layer, modules, outputs, run)
        kept = DenseActivations(hidden, {name: [] for name in inputs}, {name: [] for name in outputs}, repeat)
        handles = [modules[name].register_forward_hook(collect_input(kept.inputs[name])) for name in inputs]
        handles += [modules[name].register_forward_hook(collect_output(kept.outputs[name])) for name in outputs]
        for i, number in enumerate(self.dense.members):
            if i == self._kept:
                remove(handles)
            self.dense.hidden[i] = self.stream.run(layer, index, number, self.dense.hidden[i])
        remove(handles)
        return kept

    def _writers(self, candidates: Sequence[str]) -> list[str]:
        """The candidates if the layer's output equals its input plus their outputs, else an empty list."""
        if not candidates:
            return []
        hidden, after = self._activations.hidden[0], self.dense.hidden[0]
        parts = [self._activations.outputs[name][0].to(hidden.device) for name in candidates]
        if any(part.shape != hidden.shape for part in parts):
            return []
        change = after.float() - hidden.float()
        difference = change - sum(part.float() for part in parts)
        norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (difference, change)]
        return list(candidates) if norms[0] <= ADDITIVE * norms[1] else []

    def start(self, writers: Sequence[str]) -> None:
        """Begin the factored layer's forward passes.

        Args:
            writers: projections that add to the residual stream.
        """
        batches = zip(self.factored.members, self.factored.hidden, strict=True)
        forward = partial(self.stream.run, self._layer, self._index)
        self._runs: list[PausedForward | RepeatedForward] = [
            (PausedForward if i < self._kept else RepeatedForward)(partial(forward, number, hidden))
            for i, (number, hidden) in enumerate(batches)
        ]
        handles = [self._modules[name].register_forward_pre_hook(pause_before(name)) for name in self._leaders]
        handles += [self._modules[name].register_forward_hook(keep_output(name)) for name in writers]
        self._opened.callback(remove, handles)

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Replace a dense weight by a reconstructed one, [out, in]; the layer is loaded again for every visit."""
        module = self._modules[name]
        weight = weight.to(module.weight.device, module.weight.dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)

    @torch.no_grad()
    def sums(self, name: str, earlier: Sequence[str] | None) -> Iterator[TargetSums]:
        """What the target of a projection follows from.

        Args:
            name: of the projection; the factored layer's forward passes are run until it is called.
            earlier: the projections that add to the residual stream before this one; None if this one does not.

        Yields:
            The sums of each block.

        Raises:
            InputError: the inputs belong to other tokens than in the dense layer.
        """
        out, width = self._modules[name].weight.shape
        for block, places in self.factored.blocks():
            found = TargetSums.zero(out, width, not self.all_tokens, earlier is not None, self.stream.device)
            found.block = block
            for i in places:
                self._add(found, i, name, earlier)
            yield found
        del self._activations.inputs[name]

    def _add(self, found: TargetSums, i: int, name: str, earlier: Sequence[str] | None) -> None:
        """Add a batch to the sums of a projection; arguments as of `sums`."""
        x, outputs = self._runs[i].run_until(name)
        dense_input, dense_outputs = self._activations.at(i, name)
        factored_x, dense_x = by_window(x), by_window(dense_input.to(x.device))
        if dense_x.shape != factored_x.shape:
            raise other_tokens(name)
        scale = token_scale(factored_x)
        rows = (factored_x * scale).flatten(0, 1)
        found.tokens += len(rows)
        found.gram.add(rows)
        found.cross.add((dense_x * scale).flatten(0, 1), rows)
        if found.dense is not None:
            found.dense.add((dense_x * token_scale(dense_x)).flatten(0, 1))
        if found.stream is not None:
            error = self._activations.hidden[i].float() - self.factored.hidden[i].float()
            for writer in earlier or ():
                error += dense_outputs[writer].to(x.device).float() - outputs[writer].float()
            found.stream.add((error * scale).flatten(0, 1), rows)
            output = dense_outputs[name].to(x.device).float() * scale
            found.own += float(torch.linalg.vector_norm(output, dtype=torch.float64)) ** 2

    @torch.no_grad()
    def finish(self) -> None:
        """Run the layer's factored version to its end.

        Raises:
            InputError: an output of the factored layer is not finite.
        """
        try:
            for i in range(len(self._runs)):
                self.factored.hidden[i] = self._runs.pop(0).finish()
                if not is_finite(self.factored.hidden[i]):
                    raise factored_overflow(self.stream.source.paths[self._index], self.stream.dtype)
        finally:
            self._opened.close()
        for flow in (self.dense, self.factored):
            self.stream.leave(self._index, flow)
        del self._activations


def factored_overflow(name: str, dtype: torch.dtype) -> InputError:
    """The error for activations of the factored model that are not finite."""
    narrow = dtype == torch.float16
    advice = "calibrate with `dtype` float32 or bfloat16" if narrow else "use a smaller `ratio` or `no_sequential`"
    return InputError(f"{name}: the factored model overflows here in {dtype}; {advice}")
