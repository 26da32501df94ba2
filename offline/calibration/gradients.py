"""Measured sensitivities: second moments of the loss gradient at every projection's output.

For a small change dW of a weight W the loss rises by about 0.5 tr(G dW C dW^T) nats a token, where
C = E[x x^T] are its inputs and G = E[g g^T] the gradients of the loss at its outputs, with labels
drawn from the model itself (see `objective`; the Kronecker-factored Fisher information, Martens and Grosse 2015).
This makes the errors of different projections comparable, which the uniform tolerance assumes and
which is not so.

The product of the two averages takes gradients and inputs as independent, which they are not: errors
matter most where gradients are large. So half of C is C_w = E[w x x^T], w = ||g||^2 / E||g||^2, with the tokens
weighted by their gradients. Only half, since gradients are blind to what is not small: a layer that feeds the token
which all others attend to shows none there, yet must not lose that token (docs/dev/log.md).

The gradients come from a layer-wise backward pass: every layer is loaded once more, run forward
again from its stored inputs, and run backward. Memory holds one layer, as in calibration.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gram import robust_rows
from pgsvd_vllm.offline.calibration.loss import Objective
from pgsvd_vllm.offline.linalg import gram_of
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# A backward pass costs twice a forward pass: no more tokens than this take part in it. On other text, factors
# fitted with 16k tokens lost 5 % more than with 32k; 64k should be within 3 % of any number (docs/dev/log.md).
GRADIENT_TOKENS = 65536


@dataclass(frozen=True)
class LayerGradients:
    """What the backward pass finds of one layer.

    Attributes:
        moments: projection -> G float64 [out, out], the mean over the tokens that reach it, times the tower's tokens
            for each term of the loss: 1 in a language model.
        grams: projection -> C_w float64 [in, in], x scaled by its `token_scale`; the mean over all
            tokens, of which those that do not reach it count as 0.
    """

    moments: dict[str, torch.Tensor]
    grams: dict[str, torch.Tensor]


class GradientPass:
    """Collects G for every projection, from the last layer to the first.

    Args:
        stream: the calibration's stream; `remember` is called before every layer's advance.
        folder: where the layers' inputs are kept meanwhile.

    Attributes:
        batches: how many take part.
        losses: terms that the loss has; set by `start`. Tokens of a language model, images and texts of a comparison.
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
        # Batch -> index of a layer -> the gradient at its output, as far as it is known.
        self._gradients: dict[int, dict[int, torch.Tensor]] = {number: {} for number in range(self.batches)}

    def remember(self, index: int) -> None:
        """Keep the inputs of layer `index`, which the stream is about to replace."""
        flow = self.stream.flow
        inputs = {
            str(n): h.cpu().contiguous() for n, h in zip(flow.members, flow.hidden, strict=True) if n < self.batches
        }
        save_file(inputs, self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def start(self, seed: int) -> None:
        """Gradients at the outputs that the model's head reads, of the loss summed over all its terms.

        Args:
            seed: of the draw of labels.
        """
        source, stream = self.stream.source, self.stream
        source.load_lm_head(stream.device, stream.dtype)
        outputs = {
            number: {index: kept.detach().requires_grad_() for index, kept in stream.flow.kept[number].items()}
            for number in range(self.batches)
        }
        self.losses = Objective(stream, seed).backward(outputs)
        for number, found in outputs.items():
            for index, leaf in found.items():
                if leaf.grad is None:
                    continue
                if not torch.isfinite(leaf.grad).all():
                    raise InputError(
                        f"{source.folder}: the loss gradient overflows in {stream.dtype}; "
                        "calibrate with `dtype` float32 or bfloat16"
                    )
                self._gradients[number][index] = leaf.grad

    def retreat(self, index: int, projections: Sequence[Projection]) -> Iterator[int | LayerGradients]:
        """Run layer `index` backward over all batches.

        Yields the tokens done after every batch, and the layer's gradients at the end.

        Raises:
            InputError: no token reaches one of the projections.
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
                    arrived = self._gradients[number].pop(index, None)
                    if arrived is None:  # behind the last layer whose output is read
                        continue
                    leaf = hidden.to(self.stream.device).requires_grad_()
                    self.stream.run(layer, index, number, leaf).backward(arrived)
                    assert leaf.grad is not None
                    if index > first:
                        self._add(number, index - 1, leaf.grad)
                    elif first > 0:
                        self._cross(number, first, leaf.grad)
                    tokens += leaf.shape[:-1].numel()
                    yield leaf.shape[:-1].numel()
            finally:
                hooks.remove()
        path.unlink()
        yield hooks.result(tokens, tokens / self.losses)

    def _add(self, number: int, index: int, gradient: torch.Tensor) -> None:
        known = self._gradients[number].get(index)
        self._gradients[number][index] = gradient if known is None else known + gradient

    def _cross(self, number: int, start: int, gradient: torch.Tensor) -> None:
        """From the hidden states before a tower to the outputs of the towers before, such as images' behind texts."""
        kept = self.stream.flow.kept[number]
        outputs = {index: hidden.detach().requires_grad_() for index, hidden in kept.items() if index < start}
        entry = self.stream.before(start, number, outputs)
        if entry is None or not entry.requires_grad:
            return
        entry.backward(gradient)
        for index, leaf in outputs.items():
            if leaf.grad is not None:
                self._add(number, index, leaf.grad)


@dataclass
class _Sums:
    """Of one projection: its tokens, sum g g^T, sum ||g||^2 x x^T."""

    tokens: int
    moment: torch.Tensor
    gram: torch.Tensor


class _GradientHooks:
    """Hooks on a layer's projections that sum what `LayerGradients` holds.

    Args:
        modules: by name.
        routed: those that no token need reach; there is no result of them then.
    """

    def __init__(self, modules: dict[str, nn.Module], routed: Collection[str] = ()) -> None:
        self._routed = routed
        self._sums = {name: _Sums(0, torch.zeros(()), torch.zeros(())) for name in modules}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def forward_hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, sums = args[0].detach(), self._sums[name]

            def add(gradient: torch.Tensor) -> None:
                rows = gradient.detach().flatten(0, -2).float()
                norms = rows.norm(dim=1, keepdim=True)
                sums.tokens += len(rows)
                sums.moment = gram_of(rows) + sums.moment.to(rows.device)
                sums.gram = gram_of(robust_rows(x) * norms) + sums.gram.to(rows.device)

            output.register_hook(add)

        return forward_hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self, tokens: int, weight: float = 1.0) -> LayerGradients:
        """The means, of a pass over `tokens` tokens that weighs `weight` tokens for each term of the loss."""
        moments, grams = {}, {}
        for name, sums in self._sums.items():
            if not sums.tokens:
                if name in self._routed:
                    continue
                raise InputError(
                    f"{name}: none of the calibration text's first {tokens} tokens reaches it; "
                    f"leave it dense with `ignore` {name}, or use `sensitivity` forward"
                )
            moments[name] = sums.moment * (weight / sums.tokens)
            energy = float(sums.moment.trace())  # sum ||g||^2
            # Without any gradient all weights are 0: nothing of it matters.
            grams[name] = sums.gram * (sums.tokens / tokens / energy if energy > 0 else 0.0)
        return LayerGradients(moments, grams)
