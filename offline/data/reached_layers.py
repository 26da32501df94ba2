"""Finds the layers that the calibration data reaches and whose outputs the model uses."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.data.image_text import Pairs
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource


@dataclass(frozen=True)
class Reach:
    """The layers that the calibration data reaches.

    Attributes:
        layers: indexes of the layers that run and whose outputs the model uses.
        tokens_per_pixel: tokens of the vision encoder per element of `pixel_values`; 0 without images.
    """

    layers: frozenset[int]
    tokens_per_pixel: float


def reached_layers(source: ModelSource, pairs: Pairs | None, device: torch.device, dtype: torch.dtype) -> Reach:
    """Run the first batch of a vision-language model's pairs; a language model uses all of its layers.

    Args:
        source: the model.
        pairs: images with texts; None leaves only the language model's layers.
        device: that computes.
        dtype: of weights and activations.

    Raises:
        InputError: the architecture is not supported (see `LayerStream`).
    """
    if not source.reads_images:
        return Reach(frozenset(range(len(source.layers))), 0.0)
    reached = set(range(source.spans[-1].start, len(source.layers)))
    per_pixel = 0.0
    if pairs is not None:
        stream = LayerStream(source, pairs.batches[:1], device, dtype)
        for end in stream.read:
            reached.update(range(source.span(end).start, end + 1))
        tokens = sum(hidden.shape[:-1].numel() for hidden in stream.flow.hidden)
        per_pixel = tokens / max(1, pairs.batches[0].get("pixel_values", torch.empty(0)).numel())
    return Reach(frozenset(reached), per_pixel)


def reached_projections(projections: ProjectionSet, reach: Reach) -> ProjectionSet:
    """The set in which the projections of layers that are not reached are unused ones."""
    unused: list[Projection] = [
        p for index, row in enumerate(projections.layers) if index not in reach.layers for p in row
    ]
    layers = [row if index in reach.layers else [] for index, row in enumerate(projections.layers)]
    return ProjectionSet(layers, projections.ignored, unused, projections.lm_head)
