"""Sums the Gram matrices of all projections' inputs while the dense model runs layer by layer.

Projections with the same input (q, k, v; gate, up) share one Gram matrix; they are called with the same tensor object.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.linalg import GramSum, ordinary, overflow
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# A token counts with at most this many times the median energy of its window (see `token_scale`).
ENERGY_CLIP = 10.0


@dataclass
class LayerGrams:
    """The Gram matrices of one layer's inputs, over a block of batches or over all.

    Attributes:
        block: of the batches.
        sums: leader -> sum of x x^T over the tokens.
        leader: projection -> name of the first projection with the same input.
        tokens: tokens that run through the layer.
        counts: leader -> tokens in its sum.
    """

    block: int = 0
    sums: dict[str, GramSum] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "LayerGrams") -> None:
        """Add the sums of another block."""
        for name, total in other.sums.items():
            self.sums.setdefault(name, GramSum(total.width, total.device)).merge(total)
        self.leader.update(other.leader)
        self.tokens += other.tokens
        self.counts.update(other.counts)

    def check_called(self, projections: Sequence[Projection]) -> None:
        """Refuse projections that the layer has not called for any token; raises InputError."""
        missing = [p.name for p in projections if p.name not in self.leader and p.reach == 1]
        if missing:
            raise InputError(f"{missing[0]}: the layer never calls it; leave it dense with `ignore` {missing[0]}")


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """The factor of each token that keeps attention sinks from dominating the Gram matrix.

    In some layers the first position carries over 99 % of the inputs' energy (an attention sink); a low-rank matrix
    that is exact on that token alone would meet any tolerance. Robust clipping, an addition to PGSVD, limits each
    token's energy ||x_t||^2 to ENERGY_CLIP times the median of its window's nonzero tokens.

    Args:
        x: float32 [windows, tokens, in].

    Returns:
        float32 [windows, tokens, 1], at most 1.
    """
    energy = ordinary(x)[0].square().sum(-1, keepdim=True)
    # Zero tokens do not count: a window with few others has a median as well.
    median = energy.where(energy > 0, torch.nan).nanmedian(dim=1, keepdim=True).values
    return (ENERGY_CLIP * median / energy).clamp_max(1.0).sqrt().nan_to_num(1.0)


def by_window(x: torch.Tensor) -> torch.Tensor:
    """A projection's input as float32 [windows, tokens, in]; the rows [tokens, in] of an MoE expert form one window."""
    return (x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])).float()


def robust_rows(x: torch.Tensor) -> torch.Tensor:
    """A projection's input with each token multiplied by its `token_scale`.

    Args:
        x: [windows, tokens, in] or [tokens, in].

    Returns:
        float32 [windows * tokens, in].
    """
    x = by_window(x)
    return (x * token_scale(x)).flatten(0, 1)


class _GramHooks:
    """Hooks on a layer's projections that sum the Gram matrix of each distinct input once.

    Attributes:
        origin: names the first projection whose output is not finite, for an error message; empty if all are finite.
    """

    def __init__(self, layer: nn.Module, projections: Sequence[Projection], prefix: str) -> None:
        self._found = LayerGrams()
        self.origin = ""
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._handles: list[RemovableHandle] = []
        for p in projections:
            module = layer.get_submodule(p.path.removeprefix(prefix))
            self._handles.append(module.register_forward_pre_hook(self._hook(p.name)))
            self._handles.append(module.register_forward_hook(self._output_hook(p.name)))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            for tensor, leader in self._seen:
                if tensor is x:
                    self._found.leader[name] = leader
                    return
            self._seen.append((x, name))
            self._found.leader[name] = name
            if not is_finite(x):
                raise overflow(f"{name}: its input{self.origin}", x.dtype)
            rows = robust_rows(x)
            self._found.counts[name] += len(rows)
            self._found.sums.setdefault(name, GramSum(rows.shape[1], rows.device)).add(rows)

        return hook

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            if not self.origin and not is_finite(output):
                self.origin = f" (first the output of {name})"

        return hook

    def end_batch(self, tokens: int) -> None:
        """Count the tokens of a batch and release its inputs, kept to recognise projections with the same input."""
        self._found.tokens += tokens
        self._seen.clear()

    def take(self, block: int) -> LayerGrams:
        """The sums since the last call."""
        found, self._found = self._found, LayerGrams()
        found.block = block
        return found

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def advance(
    stream: LayerStream, index: int, projections: Sequence[Projection], collect: bool
) -> Iterator[int | LayerGrams]:
    """Run layer `index` over all batches and replace the hidden states by its outputs.

    Args:
        stream: that has entered the layer.
        index: of the layer.
        projections: of the layer.
        collect: whether to sum Gram matrices.

    Yields:
        The tokens of each batch that is done, and, if `collect`, the layer's Gram matrices of each block.

    Raises:
        InputError: an output of the layer or an input of a projection is not finite.
    """
    path = stream.source.paths[index]
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        hooks = _GramHooks(layer, projections if collect else (), f"{path}.")
        try:
            for block, places in stream.flow.blocks():
                for i in places:
                    output = stream.run(layer, index, stream.flow.members[i], stream.flow.hidden[i])
                    done = stream.flow.hidden[i].shape[:-1].numel()
                    hooks.end_batch(done)
                    if not is_finite(output):
                        raise overflow(f"{path}: the layer's output{hooks.origin}", stream.dtype)
                    stream.flow.hidden[i] = output
                    yield done
                if collect:
                    yield hooks.take(block)
        finally:
            hooks.remove()
    stream.leave(index, stream.flow)
