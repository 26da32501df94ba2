"""Sensitivities from forward passes alone, for models whose gradients do not fit in memory.

A projection's output is disturbed by noise of known size, and the layer is run to its end: the energy
of the change of the residual stream, relative to the stream's own and per energy of the noise, says
what an error of this projection weighs. All directions of the output weigh the same, and an error of the stream
the same in every layer: cruder than gradients (see docs/quality.md), but one number a projection and no
backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection

# Noise relative to the output's size: as large as the errors that cutting ranks makes, and far above bf16's rounding.
NOISE = 0.25


@torch.no_grad()
def noise_responses(stream: LayerStream, index: int, projections: Sequence[Projection], seed: int) -> dict[str, float]:
    """The stream's response to every projection of a layer; the first batch of windows takes part.

    Args:
        stream: before the layer's advance.
        index: of the layer.
        projections: of the layer.
        seed: of the noise.

    Returns:
        projection -> relative energy of the stream's change per energy of the output's, means over all tokens; none
        of an expert that no token of the batch reaches.
    """
    generator = torch.Generator(stream.device).manual_seed(seed)
    if not stream.flow.hidden:
        return {}
    hidden, number = stream.flow.hidden[0], stream.flow.members[0]
    prefix = f"{stream.source.paths[index]}."
    tokens = hidden.shape[:-1].numel()
    found = {}
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        plain = stream.run(layer, index, number, hidden).float()
        size = plain.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        for p in projections:
            energy: list[float] = []

            def disturb(
                _module: nn.Module, _args: Any, output: torch.Tensor, energy: list[float] = energy
            ) -> torch.Tensor:
                noise = torch.randn(output.shape, generator=generator, device=output.device)
                noise *= NOISE * output.float().square().mean().sqrt()
                energy.append(float(noise.square().sum()) / tokens)
                return output + noise.to(output.dtype)

            handle = layer.get_submodule(p.path.removeprefix(prefix)).register_forward_hook(disturb)
            moved = (stream.run(layer, index, number, hidden).float() - plain).square().sum(-1)
            handle.remove()
            if not energy and p.reach < 1:
                continue
            # A projection that puts out nothing moves nothing.
            found[p.name] = float((moved / size).mean()) / sum(energy) if sum(energy) > 0 else 0.0
    return found
