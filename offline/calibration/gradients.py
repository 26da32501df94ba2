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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.calibration.gram import robust_rows
from pgsvd_vllm.offline.calibration.loss import Embeddings, next_token_backward
from pgsvd_vllm.offline.linalg import GramSum, ordinary, overflow
from pgsvd_vllm.offline.model.batch import block_of
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Tokens of the backward pass, which costs twice a forward pass. On other text, factors fitted with 16k tokens lost 5 %
# more than with 32k; 64k should be within 3 % of any larger number (docs/dev/log.md).
GRADIENT_TOKENS = 65536


def batch_tokens(stream: LayerStream) -> dict[int, int]:
    """Batch -> its tokens of text, or of an image where these are more; of a stream that has run no layer yet."""
    tokens = {number: batch["input_ids"].numel() for number, batch in stream.batches.items()}
    for number, hidden in zip(stream.flow.members, stream.flow.hidden, strict=True):
        tokens[number] = max(tokens[number], hidden.shape[:-1].numel())
    return tokens


def gradient_batches(tokens: Mapping[int, int]) -> set[int]:
    """The numbers of the batches that take part, the first ones, from `batch_tokens` of all of them."""
    numbers = sorted(tokens)
    ends = itertools.accumulate((tokens[number] for number in numbers), initial=0)
    return {number for number, before in zip(numbers, ends, strict=False) if before < GRADIENT_TOKENS}


class GradientPass:
    """Sums the gradient moments of every projection, from the last layer to the first.

    Call `remember` before each layer runs forward, then run `start` or, for a dual encoder, `embed` and `start_from`,
    then `retreat` for each layer in reverse order.

    Args:
        stream: of the calibration.
        folder: for the stored inputs of the layers.
        numbers: of the batches that take part.

    Attributes:
        losses: number of loss terms, set at the start: tokens of a language model, images and texts of a dual encoder.
    """

    def __init__(self, stream: LayerStream, folder: Path, numbers: Collection[int]) -> None:
        self.stream = stream
        self.folder = folder
        self.losses = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = [number for number in stream.batches if number in numbers]
        # Batch -> layer index -> the gradient at the layer's output, summed so far.
        self._gradients: dict[int, dict[int, torch.Tensor]] = {number: {} for number in self._numbers}
        # The same at outputs to which the model adds something before the next layer.
        self._additions: dict[int, dict[int, torch.Tensor]] = {number: {} for number in self._numbers}
        # The graph of a dual encoder from the outputs of its layers to its embeddings.
        self._embedded: list[tuple[int, dict[int, torch.Tensor], Any]] = []

    def remember(self, index: int) -> None:
        """Store the inputs of layer `index`, which its forward pass will overwrite."""
        flow = self.stream.flow
        inputs = {
            str(n): h.cpu().contiguous() for n, h in zip(flow.members, flow.hidden, strict=True) if n in self._gradients
        }
        save_file(inputs, self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _leaves(self, number: int) -> dict[int, torch.Tensor]:
        """The outputs of layers that a batch's loss depends on."""
        return {index: kept.detach().requires_grad_() for index, kept in self.stream.flow.kept[number].items()}

    def _begin(self, number: int, leaves: dict[int, torch.Tensor]) -> None:
        """Take the gradients at a batch's outputs; raises InputError if one is not finite."""
        for index, leaf in leaves.items():
            if leaf.grad is None:
                continue
            if not is_finite(leaf.grad):
                raise overflow(f"{self.stream.source.folder}: the loss gradient", self.stream.dtype)
            self._gradients[number][index] = leaf.grad

    def start(self, seed: int) -> Iterator[int]:
        """Compute the gradients of the summed loss at the outputs of the last layers.

        Args:
            seed: of the draw of labels.

        Yields:
            The tokens of each batch of text that is done.

        Raises:
            InputError: a gradient or a prediction is not finite.
        """
        self.stream.source.load_lm_head(self.stream.device, self.stream.dtype)
        for number in self._numbers:
            leaves = self._leaves(number)
            self.losses += next_token_backward(self.stream, number, leaves, seed)
            self._begin(number, leaves)
            yield self.stream.batches[number]["input_ids"].numel()

    def embed(self) -> dict[int, Embeddings]:
        """Batch -> its embeddings, of a dual encoder."""
        for number in self._numbers:
            leaves = self._leaves(number)
            self._embedded.append((number, leaves, self.stream.output(number, leaves)))
        return {n: (found.text_embeds.detach(), found.image_embeds.detach()) for n, _, found in self._embedded}

    def start_from(self, gradients: Mapping[int, Embeddings]) -> None:
        """Go on from the gradients at the embeddings of each batch.

        Raises:
            InputError: a gradient is not finite.
        """
        for number, leaves, found in self._embedded:
            texts, images = (part.to(self.stream.device, found.text_embeds.dtype) for part in gradients[number])
            torch.autograd.backward([found.text_embeds, found.image_embeds], [texts, images])
            self.losses += len(texts) + len(images)
            self._begin(number, leaves)
        self._embedded.clear()

    def retreat(self, index: int, projections: Sequence[Projection]) -> "Iterator[int | GradientSums]":
        """Run layer `index` backward over all batches.

        Args:
            index: of the layer.
            projections: of the layer.

        Yields:
            The tokens of each batch that is done, and the layer's gradient moments of each block.

        Raises:
            InputError: a gradient is not finite.
        """
        path = self._file(index)
        inputs = load_file(path)
        prefix = f"{self.stream.source.paths[index]}."
        with self.stream.source.layer(index, self.stream.device, self.stream.dtype) as layer:
            modules = {p.name: layer.get_submodule(p.path.removeprefix(prefix)) for p in projections}
            hooks = _GradientHooks(modules)
            try:
                members = [number for number in self._numbers if str(number) in inputs]
                for block, numbers in itertools.groupby(members, block_of):
                    for number in numbers:
                        # Without one the loss does not depend on this layer.
                        gradient = self._gradients[number].pop(index, None)
                        if gradient is not None:
                            yield self._retreat_batch(layer, index, number, inputs.pop(str(number)), gradient, hooks)
                    yield hooks.take(block)
            finally:
                hooks.remove()
        path.unlink()

    def _retreat_batch(
        self,
        layer: nn.Module,
        index: int,
        number: int,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        hooks: "_GradientHooks",
    ) -> int:
        """Run a layer backward on a batch; returns its tokens."""
        leaf = hidden.to(self.stream.device).requires_grad_()
        self.stream.run(layer, index, number, leaf).backward(gradient)
        assert leaf.grad is not None
        if not is_finite(leaf.grad):
            path = self.stream.source.paths[index]
            raise overflow(f"{path}: the loss gradient{hooks.origin}", self.stream.dtype)
        first = self.stream.source.span(index).start
        if index > first:
            self._add(number, index - 1, leaf.grad)
            if index - 1 in self.stream.flow.added.get(number, {}):
                self._additions[number][index - 1] = leaf.grad
        elif first > 0:
            self._cross_towers(number, first, leaf.grad)
        tokens = leaf.shape[:-1].numel()
        hooks.found.tokens += tokens
        return tokens

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
class ProjectionSums:
    """The sums of one projection: tokens, sum of g g^T, sum of ||g||^2 x x^T."""

    tokens: int
    moment: GramSum
    gram: GramSum

    @classmethod
    def like(cls, other: "ProjectionSums") -> "ProjectionSums":
        """Zero, of the same shapes."""
        return cls(0, *(GramSum(one.width, one.device) for one in (other.moment, other.gram)))

    def moments(
        self, tokens: int, losses: int, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """G and C_w; the sums are empty afterwards.

        Args:
            tokens: that the layer has run backward.
            losses: number of loss terms.
            device: of the result; None for that of the sums.

        Returns:
            G, float64 [out, out]: the mean over the tokens that reach the projection, times the tower's tokens per loss
            term, which is 1 for a language model. C_w, float64 [in, in]: the mean over all tokens of w x x^T with x
            scaled by its `token_scale`; tokens that do not reach the projection count as 0.
        """
        moment = self.moment.matrix().to(device)
        energy = float(moment.trace())  # sum ||g||^2
        # Without any gradient all token weights are 0.
        weighted = self.gram.matrix().to(device).mul_(self.tokens / tokens / energy if energy > 0 else 0.0)
        return moment.mul_(tokens / losses / self.tokens), weighted


@dataclass
class GradientSums:
    """The sums of one layer, over a block of batches or over all.

    Attributes:
        block: of the batches.
        sums: by projection.
        tokens: that the layer has run backward.
    """

    block: int = 0
    sums: dict[str, ProjectionSums] = field(default_factory=dict)
    tokens: int = 0

    def merge(self, other: "GradientSums") -> None:
        """Add the sums of another block."""
        for name, sums in other.sums.items():
            own = self.sums.setdefault(name, ProjectionSums.like(sums))
            own.tokens += sums.tokens
            own.moment.merge(sums.moment)
            own.gram.merge(sums.gram)
        self.tokens += other.tokens

    def reached(self, projections: Sequence[Projection]) -> list[Projection]:
        """The projections that tokens reach.

        Raises:
            InputError: no token reaches a projection that is not an MoE expert's.
        """
        seen = {name for name, sums in self.sums.items() if sums.tokens}
        missing = [p.name for p in projections if p.name not in seen and p.reach == 1]
        if missing:
            raise InputError(
                f"{missing[0]}: none of the first {self.tokens} calibration tokens reaches it; "
                f"leave it dense with `ignore` {missing[0]}, or use `sensitivity` forward"
            )
        return [p for p in projections if p.name in seen]


class _GradientHooks:
    """Hooks on a layer's projections that sum gradient moments.

    Attributes:
        found: the sums since the last `take`.
        origin: names the first projection whose gradient is not finite, for an error message; empty if all are finite.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.found = GradientSums()
        self.origin = ""
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
                if name not in self.found.sums:
                    moment, gram = (GramSum(width, rows.device) for width in (rows.shape[1], x.shape[-1]))
                    self.found.sums[name] = ProjectionSums(0, moment, gram)
                sums = self.found.sums[name]
                sums.tokens += len(rows)
                sums.moment.add(rows)
                sums.gram.add(robust_rows(x) * norms, exponent)

            output.register_hook(add)

        return forward_hook

    def take(self, block: int) -> GradientSums:
        """The sums since the last call."""
        found, self.found = self.found, GradientSums()
        found.block = block
        return found

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
