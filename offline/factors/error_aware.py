"""The error-aware fit: layers are factored in order, each fitted to activations from the already factored layers.

The factors of a projection W are fitted to the inputs x' that the factored model gives it, and to a target M that
corrects part of the error of these inputs:

    min ||M X' - ((1 - f) W X' + f W X)||^2 + lam ||M - W||^2
    M = W ((1 - f) C' + f D + lam I) (C' + lam I)^-1,   C' = sum x' x'^T,  D = sum x x'^T,

with x the dense model's inputs for the same tokens. MPIFA (arXiv 2501.19090) mixes its targets in the same way.

Some projections add their output to the residual stream (o_proj, down_proj). Their target also corrects part of the
error e = h - h' of the stream, as far as it is a linear function of their inputs: M gains g R (C' + lam I)^-1 with
R = sum e x'^T. These projections are found by the data, not by name: the layer's output must equal its input plus
their outputs on the calibration tokens.

Such targets overfit the tokens of this pass. M is therefore truncated to its rank in another norm: that of the Gram
matrix of all calibration tokens plus the shift C' - C, with C = sum x x^T over the pass's tokens (docs/dev/log.md).

A layer runs once with its factors: the forward pass of every batch pauses before each projection until that projection
is factored. Memory holds one layer, the hidden states of both models, the dense inputs of the layer's projections, and
the paused forward passes. Where these do not fit, the passes of some batches are repeated for each projection instead,
which gives the same bits.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
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
from pgsvd_vllm.offline.linalg import GramSum, cholesky, cross_gram, naming
from pgsvd_vllm.offline.model.layerwise import Flow, LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Calibration tokens of the pass; twice as many gain as much as half as many lose (docs/dev/log.md).
SEQUENTIAL_TOKENS = 131072
# f and g: the corrected shares of the inputs' error and of the residual stream's error.
CORRECTED = 0.5
STREAM_CORRECTED = 0.5
# lam, as a share of the mean of the diagonal of C'; it grows where rounding makes C' indefinite.
RIDGE = 1e-3
# Largest energy of the stream's correction, relative to that of the projection's own output. A projection of almost no
# output must not become a corrector whose weights are as large as its inputs are small. Others are far smaller.
LARGEST_SHIFT = 100.0
# Largest deviation of a layer's output from its input plus its writers' outputs, relative to the change by the layer.
ADDITIVE = 0.02


@dataclass(frozen=True)
class Target:
    """The target M = W change + shift of a projection, for inputs with Gram matrix C'.

    Attributes:
        change: float64 [in, in].
        shift: float64 [out, in]; None for a projection that does not add to the residual stream, or almost nothing.
        gram: C' = sum x' x'^T, float64 [in, in].
        dense: C = sum x x^T of the same tokens, float64 [in, in]; None if the pass takes all calibration tokens.
    """

    change: torch.Tensor
    shift: torch.Tensor | None
    gram: torch.Tensor
    dense: torch.Tensor | None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """M, float64 [out, in], for the dense weight W, float64 [out, in]."""
        matrix = weight @ self.change
        return matrix if self.shift is None else matrix + self.shift


class ErrorAwarePass:
    """Runs a model's layers with dense and factored weights side by side.

    Args:
        stream: that has run no layer yet; its flow holds the dense hidden states.
        all_tokens: whether the stream has all calibration tokens, whose C is known from calibration.
        kept_tokens: whose activations inside of a layer stay in memory; those of the first batch always do. None for
            all. The forward passes of the others are repeated for each projection.
    """

    def __init__(self, stream: LayerStream, all_tokens: bool = False, kept_tokens: int | None = None) -> None:
        self.stream = stream
        self.all_tokens = all_tokens
        self.kept_tokens = kept_tokens
        self.dense = stream.flow
        self.factored = Flow(stream.flow.tower, list(stream.flow.members), list(stream.flow.hidden))

    @torch.no_grad()
    def advance(
        self,
        index: int,
        groups: Sequence[Sequence[Projection]],
        ranked: set[str],
        fit: Callable[[Projection, Target | None], torch.Tensor],
        known: dict[str, torch.Tensor],
    ) -> Iterator[Projection]:
        """Factor layer `index` and run its dense and its factored version.

        Args:
            index: of the layer.
            groups: its projections grouped by input, in the order in which the layer calls them.
            ranked: names of the projections to factor.
            fit: factors a projection for a target and returns the reconstructed weight [out, in]; the target is None
                for a fit of the dense weight to the dense model's inputs.
            known: projection -> reconstructed weight [out, in] of a layer that was factored before; nothing is fitted
                then. Empty otherwise.

        Yields:
            Every projection once it is factored.

        Raises:
            InputError: an output of the factored layer is not finite, or a projection gets other tokens than in the
                dense layer.
        """
        for flow in (self.dense, self.factored):
            self.stream.enter(index, flow)
        prefix = f"{self.stream.source.paths[index]}."
        with self.stream.source.layer(index, self.stream.device, self.stream.dtype) as layer:
            modules = {p.name: layer.get_submodule(p.path.removeprefix(prefix)) for row in groups for p in row}
            routed = [p for g in groups for p in g if p.reach < 1]
            groups = [g for g in groups if g[0].reach == 1]
            single = [g[0] for g in groups if len(g) == 1 and g[0].out_features == self._width]
            candidates = [] if known else [p.name for p in single]
            leaders = [] if known else [g[0].name for g in groups if any(p.name in ranked for p in g)]
            kept = self._kept_batches()
            dense = self._run_dense(layer, index, modules, leaders, candidates, kept)
            writers = self._writers(dense, candidates)
            for name, weight in known.items():
                _set_weight(modules[name], weight)
            # The router sends different tokens to an MoE expert in the factored layer: its inputs have no dense pairs.
            for p in routed:
                if p.name in ranked and not known:
                    _set_weight(modules[p.name], fit(p, None))
                    yield p
            batches = zip(self.factored.members, self.factored.hidden, strict=True)
            forward = partial(self.stream.run, layer, index)
            runs: list[PausedForward | RepeatedForward] = [
                (PausedForward if i < kept else RepeatedForward)(partial(forward, number, hidden))
                for i, (number, hidden) in enumerate(batches)
            ]
            handles = [modules[name].register_forward_pre_hook(pause_before(name)) for name in leaders]
            handles += [modules[name].register_forward_hook(keep_output(name)) for name in writers]
            try:
                for group in groups:
                    leader = group[0].name
                    if leader not in leaders:
                        continue
                    earlier = writers[: writers.index(leader)] if leader in writers else None
                    target = self._target(modules[leader], leader, dense, runs, earlier)
                    del dense.inputs[leader]
                    for p in group:
                        if p.name in ranked:
                            _set_weight(modules[p.name], fit(p, target))
                            yield p
                for i in range(len(runs)):
                    self.factored.hidden[i] = runs.pop(0).finish()
                    if not is_finite(self.factored.hidden[i]):
                        raise self._overflow(prefix[:-1])
            finally:
                remove(handles)
        for flow in (self.dense, self.factored):
            self.stream.leave(index, flow)

    @property
    def _width(self) -> int:
        """Width of the residual stream; 0 if no batch runs the tower."""
        return self.dense.hidden[0].shape[-1] if self.dense.hidden else 0

    def _kept_batches(self) -> int:
        """The number of batches whose activations inside of a layer stay in memory, the first ones."""
        if self.kept_tokens is None:
            return len(self.dense.members)
        tokens = itertools.accumulate(hidden.shape[:-1].numel() for hidden in self.dense.hidden)
        return max(1, sum(total <= self.kept_tokens for total in tokens))

    def _run_dense(
        self,
        layer: nn.Module,
        index: int,
        modules: dict[str, Any],
        inputs: Sequence[str],
        outputs: Sequence[str],
        count: int,
    ) -> DenseActivations:
        """Run the dense layer and keep the inputs and outputs of some projections in `count` batches on the CPU."""
        hidden = list(self.dense.hidden)

        def collect_input(tensors: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _module, args, _output: tensors.append(args[0].cpu())

        def collect_output(tensors: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _module, _args, output: tensors.append(output.cpu())

        repeat = None
        if inputs and count < len(hidden):

            def run(dense_layer: nn.Module, i: int) -> torch.Tensor:
                return self.stream.run(dense_layer, index, self.dense.members[i], hidden[i])

            repeat = repeater(layer, modules, outputs, run)
        kept = DenseActivations(hidden, {name: [] for name in inputs}, {name: [] for name in outputs}, repeat)
        handles = [modules[name].register_forward_hook(collect_input(kept.inputs[name])) for name in inputs]
        handles += [modules[name].register_forward_hook(collect_output(kept.outputs[name])) for name in outputs]
        for i, number in enumerate(self.dense.members):
            if i == count:
                remove(handles)
            self.dense.hidden[i] = self.stream.run(layer, index, number, self.dense.hidden[i])
        remove(handles)
        return kept

    def _writers(self, dense: DenseActivations, candidates: Sequence[str]) -> list[str]:
        """The candidates if the layer's output equals its input plus their outputs, else an empty list."""
        if not candidates:
            return []
        hidden, after = dense.hidden[0], self.dense.hidden[0]
        parts = [dense.outputs[name][0].to(hidden.device) for name in candidates]
        if any(part.shape != hidden.shape for part in parts):
            return []
        change = after.float() - hidden.float()
        difference = change - sum(part.float() for part in parts)
        norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (difference, change)]
        return list(candidates) if norms[0] <= ADDITIVE * norms[1] else []

    def _target(
        self,
        module: Any,
        name: str,
        dense: DenseActivations,
        runs: Sequence[PausedForward | RepeatedForward],
        earlier: Sequence[str] | None,
    ) -> Target | None:
        """The target of a projection; None if it sees zeros alone, or fewer tokens than it has inputs, as it overfits.

        Args:
            module: of the projection.
            name: of the projection.
            dense: activations of the dense layer.
            runs: the factored layer's forward passes; each is run until this projection is called.
            earlier: the projections that add to the residual stream before this one; None if this one does not.

        Raises:
            InputError: the inputs are not finite, or belong to other tokens than in the dense layer.
        """
        width = module.in_features
        device = self.stream.device
        grams, dense_grams = GramSum(width, device), None if self.all_tokens else GramSum(width, device)
        cross = torch.zeros(width, width, dtype=torch.float64, device=device)
        stream = None if earlier is None else cross.new_zeros(module.out_features, width)
        tokens, own = 0, 0.0
        for i, run in enumerate(runs):
            x, outputs = run.run_until(name)
            dense_input, dense_outputs = dense.at(i, name)
            factored_x, dense_x = by_window(x), by_window(dense_input.to(x.device))
            if dense_x.shape != factored_x.shape:
                raise other_tokens(name)
            scale = token_scale(factored_x)
            rows = (factored_x * scale).flatten(0, 1)
            tokens += len(rows)
            grams.add(rows)
            cross += cross_gram((dense_x * scale).flatten(0, 1), rows)
            if dense_grams is not None:
                dense_grams.add((dense_x * token_scale(dense_x)).flatten(0, 1))
            if stream is not None:
                error = dense.hidden[i].float() - self.factored.hidden[i].float()
                for writer in earlier or ():
                    error += dense_outputs[writer].to(x.device).float() - outputs[writer].float()
                stream += cross_gram((error * scale).flatten(0, 1), rows)
                output = dense_outputs[name].to(x.device).float() * scale
                own += float(torch.linalg.vector_norm(output, dtype=torch.float64)) ** 2
        gram = grams.matrix()
        if not is_finite(gram):
            raise self._overflow(name)
        if tokens < width or not gram.any():
            return None
        with naming(name):
            root, ridge = cholesky(gram, RIDGE)
        mixed = cross.mul_(CORRECTED).add_(gram, alpha=1 - CORRECTED)  # in place: these matrices may be GBs
        mixed.diagonal().add_(ridge)
        change = torch.cholesky_solve(mixed.T, root).T
        shift = None
        if stream is not None:
            shift = STREAM_CORRECTED * torch.cholesky_solve(stream.T, root).T
            if float((shift * stream).sum()) * STREAM_CORRECTED > LARGEST_SHIFT * own:
                shift = None
        return Target(change, shift, gram, None if dense_grams is None else dense_grams.matrix())

    def _overflow(self, name: str) -> InputError:
        """The error for activations of the factored model that are not finite."""
        narrow = self.stream.dtype == torch.float16
        advice = "calibrate with `dtype` float32 or bfloat16" if narrow else "use a smaller `ratio` or `no_sequential`"
        return InputError(f"{name}: the factored model overflows here in {self.stream.dtype}; {advice}")


def _set_weight(module: Any, weight: torch.Tensor) -> None:
    """Replace a dense weight by a reconstructed one; the layer is loaded again for every visit."""
    module.weight = nn.Parameter(weight.to(module.weight.device, module.weight.dtype), requires_grad=False)
