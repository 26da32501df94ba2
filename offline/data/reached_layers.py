"""Finds the layers that the calibration data reaches, whose outputs the model uses, and their linear layers' roles."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.layerwise import PROBE_TOKENS, LayerStream
from pgsvd_vllm.offline.model.linear_roles import other_roles
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource


@dataclass(frozen=True)
class Reach:
    """The layers that the calibration data reaches.

    Attributes:
        layers: indexes of the layers that run and whose outputs the model uses.
        tokens_per_pixel: tokens of the vision encoder per element of `pixel_values`; 0 without images.
        others: module path -> what a linear layer is instead of a projection (see `other_roles`).
    """

    layers: frozenset[int]
    tokens_per_pixel: float
    others: dict[str, str]


def reached_layers(source: ModelSource, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Reach:
    """Run the first batch of images with texts, or the beginning of a text; a language model uses all of its layers.

    Args:
        source: the model.
        data: without images only the language model's layers are reached.
        device: that computes.
        dtype: of weights and activations.

    Raises:
        InputError: the architecture is not supported (see `LayerStream`).
    """
    reached = set(range(source.spans[-1].start, len(source.layers)))
    per_pixel, pairs = 0.0, data.pairs
    batches = text_batches(data.windows.ids[:1, :PROBE_TOKENS]) if pairs is None else pairs.batches[:1]
    stream = LayerStream(source, batches, device, dtype)
    others = other_roles(stream)
    if pairs is not None:
        for end in stream.read:
            reached.update(range(source.span(end).start, end + 1))
        tokens = sum(hidden.shape[:-1].numel() for hidden in stream.flow.hidden)
        per_pixel = tokens / max(1, pairs.batches[0].get("pixel_values", torch.empty(0)).numel())
    return Reach(frozenset(reached), per_pixel, others)


def reached_projections(projections: ProjectionSet, reach: Reach) -> ProjectionSet:
    """The set in which the projections of layers that are not reached are unused ones."""
    unused: list[Projection] = [
        p for index, row in enumerate(projections.layers) if index not in reach.layers for p in row
    ]
    layers = [row if index in reach.layers else [] for index, row in enumerate(projections.layers)]
    return ProjectionSet(layers, projections.ignored, unused, projections.lm_head)
