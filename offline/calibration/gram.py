"""Calibration: the inputs' Gram matrices, summed while the dense model is run layer by layer.

Projections that read the same tensor (q, k, v; gate, up) share one matrix, found by the
identity of the tensor they are called with.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.linalg import gram_of
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# A token counts at most this many times the median energy of its window (see `robust_rows`).
ENERGY_CLIP = 10.0


@dataclass(frozen=True)
class LayerGrams:
    """Second moments of one layer's inputs.

    Attributes:
        grams: name of a group's first projection -> sum over tokens of x x^T, float64 [in, in].
        leader: projection name -> name of the first projection that reads the same input.
        tokens: tokens that ran the layer.
        counts: name of a group's first projection -> tokens summed.
    """

    grams: dict[str, torch.Tensor]
    leader: dict[str, str]
    tokens: int
    counts: dict[str, int]


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """Factors for the rows of x with which no token owns the Gram matrix.

    In some layers the first position carries over 99 % of the inputs' energy (an attention sink);
    any low-rank matrix that is right on that one token would satisfy any tolerance. Each token's
    energy e_t = ||x_t||^2 is clipped to ENERGY_CLIP times the median of its window.

    Args:
        x: float32 [windows, tokens, in].

    Returns:
        float32 [windows, tokens, 1], at most 1.
    """
    energy = x.square().sum(-1, keepdim=True)
    median = energy.median(dim=1, keepdim=True).values
    return (ENERGY_CLIP * median / energy.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0).sqrt()


def by_window(x: torch.Tensor) -> torch.Tensor:
    """A projection's input as float32 [windows, tokens, in]; expert layers get bare rows, one window."""
    return (x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])).float()


def robust_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of a projection's input times their `token_scale`, float32 [windows * tokens, in]."""
    x = by_window(x)
    return (x * token_scale(x)).flatten(0, 1)


class _GramHooks:
    """Hooks on a layer's projections that sum each distinct input once."""

    def __init__(self, layer: nn.Module, projections: Sequence[Projection], prefix: str) -> None:
        self.grams: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._handles = [
            layer.get_submodule(p.path.removeprefix(prefix)).register_forward_pre_hook(self._hook(p.name))
            for p in projections
        ]

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            for tensor, leader in self._seen:
                if tensor is x:
                    self.leader[name] = leader
                    return
            self._seen.append((x, name))
            self.leader[name] = name
            rows = robust_rows(x)
            product = gram_of(rows)
            self.counts[name] += len(rows)
            self.grams[name] = self.grams[name] + product if name in self.grams else product

        return hook

    def end_batch(self) -> None:
        self._seen.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def advance(
    stream: LayerStream, index: int, projections: Sequence[Projection], collect: bool
) -> Iterator[int | LayerGrams]:
    """Run layer `index` over all batches, replacing the hidden states by its outputs.

    Args:
        stream: has entered the layer.
        index: of the layer.
        projections: of the layer.
        collect: whether Gram matrices are wanted.

    Yields the number of tokens done after every batch, and at the end, where `collect`, the
    layer's Gram matrices.

    Raises:
        InputError: the layer's output is not finite, or it never calls one of its projections.
    """
    path, tokens = stream.source.paths[index], 0
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        hooks = _GramHooks(layer, projections if collect else (), f"{path}.")
        try:
            for i, number in enumerate(stream.flow.members):
                output = stream.run(layer, index, number, stream.flow.hidden[i])
                hooks.end_batch()
                if not torch.isfinite(output).all():
                    raise InputError(
                        f"{path}: the layer's output overflows in {stream.dtype}; "
                        "calibrate with `dtype` float32 or bfloat16"
                    )
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
        yield LayerGrams(hooks.grams, hooks.leader, tokens, dict(hooks.counts))
