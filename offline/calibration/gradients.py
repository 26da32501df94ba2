"""Measures loss sensitivities: the second moments G of the loss gradient at every projection's output.

A small change dW of a weight W raises the loss by about 0.5 tr(G dW C dW^T) nats per token. C = E[x x^T] is the second
moment of the projection's inputs, G = E[g g^T] that of the loss gradient at its outputs, with labels drawn from the
model itself (see `calibration.loss`). This is the Kronecker-factored Fisher information (K-FAC, Martens and Grosse
2015). It makes the errors of different projections comparable; a uniform tolerance assumes that they are equal.

K-FAC treats gradients and inputs as independent, but errors matter most at tokens with large gradients. The Gram matrix
of the loss therefore averages the plain second moments C and the gradient-weighted ones C_w = E[w x x^T] with
w = ||g||^2 / E||g||^2. The plain half stays because gradients only predict the loss of small changes: a layer that
produces the attention-sink token has almost no gradient there, yet a large error at that token ruins the model
(docs/dev/log.md).

The backward pass is layer-wise: each layer is loaded once more, runs forward from its stored inputs, and then backward.
Memory holds one layer, as in the forward pass.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.calibration.gram import robust_rows
from pgsvd_vllm.offline.calibration.loss import Objective
from pgsvd_vllm.offline.linalg import GramSum, ordinary, overflow
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Tokens of the backward pass, which costs twice a forward pass. On other text, factors fitted with 16k tokens lost 5 %
# more than with 32k; 64k should be within 3 % of any larger number (docs/dev/log.md).
GRADIENT_TOKENS = 65536


@dataclass(frozen=True)
class LayerGradients:
    """The gradient moments of one layer.

    Attributes:
        moments: projection -> G, float64 [out, out]: the mean over the tokens that reach it, times the tower's tokens
            per loss term, which is 1 for a language model.
        grams: projection -> C_w, float64 [in, in]: the mean over all tokens of w x x^T with x scaled by its
            `token_scale`; tokens that do not reach the projection count as 0.
    """

    moments: dict[str, torch.Tensor]
    grams: dict[str, torch.Tensor]


class GradientPass:
    """Collects G and C_w of every projection, from the last layer to the first.

    Call `remember` before each layer runs forward, then `start` once, then `retreat` for each layer in reverse order.

    Args:
        stream: of the calibration.
        folder: for the stored inputs of the layers.

    Attributes:
        batches: number of batches that take part, the first ones of the stream.
        text_tokens: tokens of their text.
        losses: number of loss terms, set by `start`: tokens of a language model, images and texts of a dual encoder.
    """

    def __init__(self, stream: LayerStream, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        self.losses = 0
        folder.mkdir(exist_ok=True)
        tokens = [batch["input_ids"].numel() for batch in stream.batches]
        for number, hidden in zip(stream.flow.members, stream.flow.hidden, strict=True):
            tokens[number] = max(tokens[number], hidden.shape[:-1].numel())
        self.batches = sum(before < GRADIENT_TOKENS for before in itertools.accumulate(tokens[:-1], initial=0))
        self.text_tokens = sum(batch["input_ids"].numel() for batch in stream.batches[: self.batches])
        # Batch -> layer index -> the gradient at the layer's output, summed so far.
        self._gradients: dict[int, dict[int, torch.Tensor]] = {number: {} for number in range(self.batches)}
        # The same at outputs to which the model adds something before the next layer.
        self._additions: dict[int, dict[int, torch.Tensor]] = {number: {} for number in range(self.batches)}

    def remember(self, index: int) -> None:
        """Store the inputs of layer `index`, which its forward pass will overwrite."""
        flow = self.stream.flow
        inputs = {
            str(n): h.cpu().contiguous() for n, h in zip(flow.members, flow.hidden, strict=True) if n < self.batches
        }
        save_file(inputs, self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def start(self, seed: int, done: Callable[[int], object] = lambda _tokens: None) -> None:
        """Compute the gradients of the summed loss at the outputs of the last layers.

        Args:
            seed: of the draw of labels.
            done: called with the tokens of each batch of text that is done.

        Raises:
            InputError: a gradient is not finite.
        """
        source, stream = self.stream.source, self.stream
        source.load_lm_head(stream.device, stream.dtype)
        outputs = {
            number: {index: kept.detach().requires_grad_() for index, kept in stream.flow.kept[number].items()}
            for number in range(self.batches)
        }
        self.losses = Objective(stream, seed).backward(outputs, done)
        for number, found in outputs.items():
            for index, leaf in found.items():
                if leaf.grad is None:
                    continue
                if not is_finite(leaf.grad):
                    raise overflow(f"{source.folder}: the loss gradient", stream.dtype)
                self._gradients[number][index] = leaf.grad

    def retreat(self, index: int, projections: Sequence[Projection]) -> Iterator[int | LayerGradients]:
        """Run layer `index` backward over all batches.

        Args:
            index: of the layer.
            projections: of the layer.

        Yields:
            The tokens of each batch that is done, and at the end the layer's gradient moments.

        Raises:
            InputError: a gradient is not finite, or no token reaches a projection that is not an MoE expert's.
        """
        path = self._file(index)
        inputs = load_file(path)
        prefix = f"{self.stream.source.paths[index]}."
        first = self.stream.source.span(index).start
        tokens = 0
        with self.stream.source.layer(index, self.stream.device, self.stream.dtype) as layer:
            modules = {p.name: layer.get_submodule(p.path.removeprefix(prefix)) for p in projections}
            hooks = _GradientHooks(modules, {p.name for p in projections if p.reach < 1})
            try:
                for name, hidden in inputs.items():
                    number = int(name)
                    gradient = self._gradients[number].pop(index, None)
                    if gradient is None:  # the loss does not depend on this layer
                        continue
                    leaf = hidden.to(self.stream.device).requires_grad_()
                    self.stream.run(layer, index, number, leaf).backward(gradient)
                    assert leaf.grad is not None
                    if not is_finite(leaf.grad):
                        raise overflow(f"{prefix[:-1]}: the loss gradient{hooks.origin}", self.stream.dtype)
                    if index > first:
                        self._add(number, index - 1, leaf.grad)
                        if index - 1 in self.stream.flow.added.get(number, {}):
                            self._additions[number][index - 1] = leaf.grad
                    elif first > 0:
                        self._cross_towers(number, first, leaf.grad)
                    tokens += leaf.shape[:-1].numel()
                    yield leaf.shape[:-1].numel()
            finally:
                hooks.remove()
        path.unlink()
        yield hooks.result(tokens, tokens / self.losses)

    def _add(self, number: int, index: int, gradient: torch.Tensor) -> None:
        """Add to a batch's gradient at the output of a layer."""
        known = self._gradients[number].get(index)
        self._gradients[number][index] = gradient if known is None else known + gradient

    def _cross_towers(self, number: int, start: int, gradient: torch.Tensor) -> None:
        """Propagate the gradient at a tower's input to the outputs of earlier towers, such as a vision encoder."""
        kept = self.stream.flow.kept[number]
        outputs = {index: hidden.detach().requires_grad_() for index, hidden in kept.items() if index < start}
        entry = self.stream.before(start, number, outputs)
        if entry is None:
            return
        ends = [(entry.hidden, gradient)]
        ends += [(entry.added[index], gradient) for index, gradient in self._additions[number].items()]
        ends = [(value, gradient) for value, gradient in ends if value.requires_grad]
        if not ends:
            return
        torch.autograd.backward([value for value, _ in ends], [gradient for _, gradient in ends])
        for index, leaf in outputs.items():
            if leaf.grad is not None:
                self._add(number, index, leaf.grad)


@dataclass
class _Sums:
    """The sums of one projection: tokens, sum of g g^T, sum of ||g||^2 x x^T."""

    tokens: int
    moment: GramSum
    gram: GramSum


class _GradientHooks:
    """Hooks on a layer's projections that sum gradient moments.

    Args:
        modules: projection -> module.
        routed: projections of MoE experts; those that no token reaches are missing in the result.

    Attributes:
        origin: names the first projection whose gradient is not finite, for an error message; empty if all are finite.
    """

    def __init__(self, modules: dict[str, nn.Module], routed: Collection[str] = ()) -> None:
        self.origin = ""
        self._routed = routed
        self._sums: dict[str, _Sums] = {}
        self._names = list(modules)
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def forward_hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].detach()

            def add(gradient: torch.Tensor) -> None:
                rows = gradient.detach().flatten(0, -2).float()
                if not self.origin and not is_finite(rows):
                    self.origin = f" (first that of {name})"
                # Norms of ordinary magnitude, and the exponent that they lack.
                scaled, exponent = ordinary(rows)
                norms = scaled.norm(dim=1, keepdim=True)
                if name not in self._sums:
                    moment, gram = (GramSum(width, rows.device) for width in (rows.shape[1], x.shape[-1]))
                    self._sums[name] = _Sums(0, moment, gram)
                sums = self._sums[name]
                sums.tokens += len(rows)
                sums.moment.add(rows)
                sums.gram.add(robust_rows(x) * norms, exponent)

            output.register_hook(add)

        return forward_hook

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def result(self, tokens: int, weight: float = 1.0) -> LayerGradients:
        """The means of a pass.

        Args:
            tokens: of the pass.
            weight: tokens per loss term.

        Raises:
            InputError: no token reaches a projection that is not in `routed`.
        """
        moments, grams = {}, {}
        for name in self._names:
            sums = self._sums.pop(name, None)
            if sums is None or not sums.tokens:
                if name in self._routed:
                    continue
                raise InputError(
                    f"{name}: none of the first {tokens} calibration tokens reaches it; "
                    f"leave it dense with `ignore` {name}, or use `sensitivity` forward"
                )
            moment = sums.moment.matrix()
            energy = float(moment.trace())  # sum ||g||^2
            moments[name] = moment.mul_(weight / sums.tokens)
            # Without any gradient all token weights are 0.
            grams[name] = sums.gram.matrix().mul_(sums.tokens / tokens / energy if energy > 0 else 0.0)
        return LayerGradients(moments, grams)
