"""Error-aware targets: layers are factored in order, each on what the factored ones before hand it.

The factors of a projection W are fitted on the inputs x' that it will really see, and towards a
matrix M that undoes part of the error which these inputs carry:

    min ||M X' - ((1 - f) W X' + f W X)||^2 + lam ||M - W||^2
    M = W ((1 - f) C' + f D + lam I) (C' + lam I)^-1,   C' = sum x' x'^T,  D = sum x x'^T,

with x the dense model's inputs on the same tokens. A projection that writes to the residual stream
is also asked to undo part of the error e = h - h' that the stream itself carries there, as far as
its inputs tell: M gains g R (C' + lam I)^-1, R = sum e x'^T. Which projections do is not guessed from
names: the layer's output must be its input plus theirs, on the calibration text.

Such targets learn the tokens of this pass by heart, so the norm in which M is then cut to its rank is not theirs: it is
that of all calibration text, moved by C' - C, with C = sum x x^T of the same tokens (docs/dev/log.md).

A layer runs once with its factors: every batch's run pauses in front of each projection until that one is factored.
Memory holds one layer, both sets of hidden states, the dense layer's inputs of its projections, and the paused runs.
(MPIFA, arXiv 2501.19090, mixes its targets likewise.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gram import by_window, token_scale
from pgsvd_vllm.offline.linalg import gram_of
from pgsvd_vllm.offline.model.layerwise import Flow, LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Calibration tokens that take part; twice as many gained what half as many lost (docs/dev/log.md).
SEQUENTIAL_TOKENS = 131072
# f and g: the shares of the inputs' and of the stream's error that are corrected.
CORRECTED = 0.5
STREAM_CORRECTED = 0.5
# lam, as a share of the mean of C's diagonal.
RIDGE = 1e-3
# How far a layer's output may be from its input plus what its writers add, relative to the latter.
ADDITIVE = 0.02


@dataclass(frozen=True)
class Target:
    """What the factors of a projection are fitted to: M = W change + shift, on inputs with Gram matrix C'.

    Attributes:
        change: float64 [in, in].
        shift: float64 [out, in], or None where nothing is added.
        gram: C', float64 [in, in].
        dense: C = sum x x^T of the same tokens, float64 [in, in]; None where these are all calibration tokens.
    """

    change: torch.Tensor
    shift: torch.Tensor | None
    gram: torch.Tensor
    dense: torch.Tensor | None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """M for the dense weight [out, in], float64."""
        matrix = weight @ self.change
        return matrix if self.shift is None else matrix + self.shift


@dataclass
class _Dense:
    """What the dense layer did, a tensor a batch: its input, its projections' inputs, and writers' outputs."""

    hidden: list[torch.Tensor]
    inputs: dict[str, list[torch.Tensor]]
    outputs: dict[str, list[torch.Tensor]]


class ErrorAwarePass:
    """Walks a model's layers with dense and factored weights side by side.

    Args:
        stream: at its start, before any layer was run; its flow is the dense one.
        whole: whether its tokens are all calibration tokens, so that nobody needs their C.
    """

    def __init__(self, stream: LayerStream, whole: bool = False) -> None:
        self.stream = stream
        self.whole = whole
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
        """Factor layer `index` and run both versions of it.

        Args:
            index: of the layer.
            groups: its projections, those that read one input together, in the order the layer
                calls them.
            ranked: the names of those to factor.
            fit: gives the factors' product [out, in] for a projection and its target; None is the dense weight on
                the dense model's inputs.
            known: the products, where the layer was factored before: nothing is fitted then.

        Yields every projection once it is factored.

        Raises:
            InputError: the factored layer's output is not finite, or a projection sees other tokens
                than the dense one.
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
            dense = self._run_dense(layer, index, modules, leaders, candidates)
            writers = self._writers(dense, candidates)
            for name, product in known.items():
                _set_weight(modules[name], product)
            # Which tokens an expert sees depends on the weights before it: there are no pairs of its inputs.
            for p in routed:
                if p.name in ranked and not known:
                    _set_weight(modules[p.name], fit(p, None))
                    yield p
            batches = zip(self.factored.members, self.factored.hidden, strict=True)
            runs = [_Run(partial(self.stream.run, layer, index, number, hidden)) for number, hidden in batches]
            handles = [modules[name].register_forward_pre_hook(_pause(name)) for name in leaders]
            handles += [modules[name].register_forward_hook(_note(name)) for name in writers]
            try:
                for group in groups:
                    leader = group[0].name
                    if leader not in leaders:
                        continue
                    before = writers[: writers.index(leader)] if leader in writers else None
                    target = self._target(modules[leader], leader, dense, runs, before)
                    del dense.inputs[leader]
                    for p in group:
                        if p.name in ranked:
                            _set_weight(modules[p.name], fit(p, target))
                            yield p
                for i, run in enumerate(runs):
                    self.factored.hidden[i] = run.end()
                    if not torch.isfinite(self.factored.hidden[i]).all():
                        raise self._overflow(prefix[:-1])
            finally:
                for handle in handles:
                    handle.remove()
        for flow in (self.dense, self.factored):
            self.stream.leave(index, flow)

    @property
    def _width(self) -> int:
        """Of the residual stream; 0 where no batch runs the tower."""
        return self.dense.hidden[0].shape[-1] if self.dense.hidden else 0

    def _run_dense(
        self, layer: nn.Module, index: int, modules: dict[str, Any], inputs: Sequence[str], outputs: Sequence[str]
    ) -> _Dense:
        """Advance the dense hidden states; remembers some projections' inputs and outputs, on the CPU."""
        seen = _Dense(list(self.dense.hidden), {name: [] for name in inputs}, {name: [] for name in outputs})

        def keep(store: list[torch.Tensor], what: int) -> Callable[..., None]:
            return lambda _module, args, output: store.append((args[0], output)[what].cpu())

        handles = [modules[name].register_forward_hook(keep(seen.inputs[name], 0)) for name in inputs]
        handles += [modules[name].register_forward_hook(keep(seen.outputs[name], 1)) for name in outputs]
        for i, number in enumerate(self.dense.members):
            self.dense.hidden[i] = self.stream.run(layer, index, number, self.dense.hidden[i])
        for handle in handles:
            handle.remove()
        return seen

    def _writers(self, dense: _Dense, candidates: Sequence[str]) -> list[str]:
        """The candidates, if the layer's output is its input plus their outputs; else none."""
        if not candidates:
            return []
        hidden, after = dense.hidden[0], self.dense.hidden[0]
        parts = [dense.outputs[name][0].to(hidden.device) for name in candidates]
        if any(part.shape != hidden.shape for part in parts):
            return []
        added = after.float() - hidden.float()
        missing = added - sum(part.float() for part in parts)
        return list(candidates) if missing.norm() <= ADDITIVE * added.norm() else []

    def _target(
        self, module: Any, name: str, dense: _Dense, runs: Sequence["_Run"], before: Sequence[str] | None
    ) -> Target | None:
        """The target of a projection; None where fewer tokens than it has inputs run it: they would be learnt by heart.

        Args:
            module, name: the projection.
            dense: what the dense layer did.
            runs: of the layer, the projections before this one factored; they are taken up to it.
            before: the projections that wrote to the residual stream before it; None if it does not.
        """
        width = module.in_features
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.stream.device)
        cross, plain = torch.zeros_like(gram), None if self.whole else torch.zeros_like(gram)
        stream = None if before is None else gram.new_zeros(module.out_features, width)
        tokens = 0
        for i, run in enumerate(runs):
            x = run.up_to(name)
            seen, wanted = by_window(x), by_window(dense.inputs[name][i].to(x.device))
            if wanted.shape != seen.shape:
                raise _other_tokens(name)
            scale = token_scale(seen)
            rows = (seen * scale).flatten(0, 1)
            tokens += len(rows)
            gram += gram_of(rows)
            cross += ((wanted * scale).flatten(0, 1).T @ rows).double()
            if plain is not None:
                plain += gram_of((wanted * token_scale(wanted)).flatten(0, 1))
            if stream is not None:
                error = dense.hidden[i].float() - self.factored.hidden[i].float()
                for writer in before or ():
                    error += dense.outputs[writer][i].to(x.device).float() - run.outputs[writer].float()
                stream += ((error * scale).flatten(0, 1).T @ rows).double()
        if not torch.isfinite(gram).all():
            raise self._overflow(name)
        if tokens < width:
            return None
        ridge = RIDGE * gram.diagonal().mean()
        mixed = cross.mul_(CORRECTED).add_(gram, alpha=1 - CORRECTED)  # in place: a wide input's matrices fill a memory
        mixed.diagonal().add_(ridge)
        root = gram.clone()
        root.diagonal().add_(ridge)
        root = torch.linalg.cholesky(root)
        change = torch.cholesky_solve(mixed.T, root).T
        shift = None if stream is None else STREAM_CORRECTED * torch.cholesky_solve(stream.T, root).T
        return Target(change, shift, gram, plain)

    def _overflow(self, name: str) -> InputError:
        return InputError(
            f"{name}: the factored model overflows here in {self.stream.dtype}; "
            "calibrate with `dtype` float32 or bfloat16"
        )


class _Run(greenlet):
    """A layer's run of one batch, which pauses in front of some projections.

    Attributes:
        outputs: of the projections behind it that are noted.
    """

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        super().__init__(lambda: (None, forward()))
        self.outputs: dict[str, torch.Tensor] = {}

    def up_to(self, name: str) -> torch.Tensor:
        """Go on until a projection is called; returns its input."""
        reached, value = self.switch()
        if reached != name:
            raise _other_tokens(name)
        return value

    def end(self) -> torch.Tensor:
        """Go on to the end; returns the layer's output."""
        name, value = self.switch()
        if name is not None:
            raise _other_tokens(name)
        return value


def _pause(name: str) -> Callable[..., None]:
    """A hook that hands a projection's name and input to whom waits for its run."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        getcurrent().parent.switch((name, args[0]))

    return hook


def _note(name: str) -> Callable[..., None]:
    """A hook that keeps a projection's output with its run."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        getcurrent().outputs[name] = output

    return hook


def _other_tokens(name: str) -> InputError:
    return InputError(
        f"{name}: its tokens depend on the weights before it (a router); "
        f"leave it dense with `ignore` {name}, or use `no_sequential`"
    )


def _set_weight(module: Any, product: torch.Tensor) -> None:
    """The layer is loaded anew for every visit, so its dense weight may be replaced."""
    module.weight = nn.Parameter(product.to(module.weight.device, module.weight.dtype), requires_grad=False)
