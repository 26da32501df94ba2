"""Measures sensitivities from forward passes alone, for models whose gradients do not fit in memory.

Noise of known energy is added to a projection's output and the layer runs to its end. The projection's sensitivity is
the energy of the resulting change of the residual stream, relative to the energy of the stream and per energy of the
noise. It is one number per projection without a backward pass. It is less accurate than gradients (docs/quality.md),
since all directions of an output count alike and errors of the stream count alike in all layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.linalg import overflow
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Noise relative to the output's RMS: about as large as truncation errors, and far above bfloat16 rounding.
NOISE = 0.25


@torch.no_grad()
def noise_responses(stream: LayerStream, index: int, projections: Sequence[Projection], seed: int) -> dict[str, float]:
    """The response of the residual stream to noise at each projection of a layer, measured on the first batch.

    Args:
        stream: that has entered the layer and not run it.
        index: of the layer.
        projections: of the layer.
        seed: of the noise.

    Returns:
        projection -> relative energy of the stream's change per energy of the noise, both means over all tokens. It
        lacks MoE experts that no token of the batch reaches, and is empty if no batch runs the tower.

    Raises:
        InputError: the layer's output or a response is not finite.
    """
    generator = torch.Generator(stream.device).manual_seed(seed)
    if not stream.flow.hidden:
        return {}
    hidden, number = stream.flow.hidden[0], stream.flow.members[0]
    prefix = f"{stream.source.paths[index]}."
    tokens = hidden.shape[:-1].numel()
    found = {}
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        clean = stream.run(layer, index, number, hidden).float()
        if not is_finite(clean):
            raise overflow(f"{stream.source.paths[index]}: the layer's output", stream.dtype)
        size = _energy(clean, -1)
        counted = size > 0  # a zero token has no size that its change could be compared with
        for p in projections:
            energy: list[float] = []

            def add_noise(
                _module: nn.Module, _args: Any, output: torch.Tensor, energy: list[float] = energy
            ) -> torch.Tensor:
                noise = torch.randn(output.shape, generator=generator, device=output.device)
                noise *= NOISE * (_energy(output) / output.numel()).sqrt()
                energy.append(float(_energy(noise)) / tokens)
                return output + noise.to(output.dtype)

            handle = layer.get_submodule(p.path.removeprefix(prefix)).register_forward_hook(add_noise)
            change = _energy(stream.run(layer, index, number, hidden).float() - clean, -1)
            handle.remove()
            if not is_finite(change):
                raise overflow(f"{p.name}: the response to noise at its output", stream.dtype)
            if not energy and p.reach < 1:
                continue
            # A projection whose output is 0 gets no noise and has no response.
            relative = (change[counted] / size[counted]).sum() / max(int(counted.sum()), 1)
            found[p.name] = float(relative) / sum(energy) if sum(energy) > 0 else 0.0
    return found


def _energy(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The sum of squares in float64, over all elements or one dimension."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()
