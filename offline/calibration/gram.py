"""Sums the Gram matrices of all projections' inputs while the dense model runs layer by layer.

Projections with the same input (q, k, v; gate, up) share one Gram matrix; they are called with the same tensor object.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerGrams:
    """The Gram matrices of one layer's inputs.

    Attributes:
        grams: leader -> sum of x x^T over the tokens, float64 [in, in].
        leader: projection -> name of the first projection with the same input.
        tokens: tokens that run through the layer.
        counts: leader -> tokens in its sum.
    """

    grams: dict[str, torch.Tensor]
    leader: dict[str, str]
    tokens: int
    counts: dict[str, int]


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
        self._sums: dict[str, GramSum] = {}
        self.leader: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
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
                    self.leader[name] = leader
                    return
            self._seen.append((x, name))
            self.leader[name] = name
            if not is_finite(x):
                raise overflow(f"{name}: its input{self.origin}", x.dtype)
            rows = robust_rows(x)
            self.counts[name] += len(rows)
            if name not in self._sums:
                self._sums[name] = GramSum(rows.shape[1], rows.device)
            self._sums[name].add(rows)

        return hook

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            if not self.origin and not is_finite(output):
                self.origin = f" (first the output of {name})"

        return hook

    def grams(self) -> dict[str, torch.Tensor]:
        """Leader -> sum of x x^T, float64 [in, in]; the hooks must not run afterwards."""
        return {name: total.matrix() for name, total in self._sums.items()}

    def end_batch(self) -> None:
        """Release the inputs of a batch, which are kept to recognise projections with the same input."""
        self._seen.clear()

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
        The tokens of each batch that is done, and at the end, if `collect`, the layer's Gram matrices.

    Raises:
        InputError: an output of the layer or an input of a projection is not finite, or the layer never calls one of
            its projections.
    """
    path, tokens = stream.source.paths[index], 0
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        hooks = _GramHooks(layer, projections if collect else (), f"{path}.")
        try:
            for i, number in enumerate(stream.flow.members):
                output = stream.run(layer, index, number, stream.flow.hidden[i])
                hooks.end_batch()
                if not is_finite(output):
                    raise overflow(f"{path}: the layer's output{hooks.origin}", stream.dtype)
                done = stream.flow.hidden[i].shape[:-1].numel()
                stream.flow.hidden[i] = output
                tokens += done
                yield done
        finally:
            hooks.remove()
    stream.leave(index, stream.flow)
    if collect:
        missing = [p.name for p in projections if p.name not in hooks.leader and p.reach == 1]
        if missing:
            raise InputError(f"{missing[0]}: the layer never calls it; leave it dense with `ignore` {missing[0]}")
        yield LayerGrams(hooks.grams(), hooks.leader, tokens, dict(hooks.counts))
