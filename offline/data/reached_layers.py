"""Which layers the calibration data reaches."""

import torch

from pgsvd_vllm.offline.data.image_text import Pairs
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource


def _reached(
    source: ModelSource,
    projections: list[list[Projection]],
    pairs: Pairs | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[list[Projection]], list[Projection], float]:
    """The projections of layers that the data reaches and something is computed from, all others, and how many tokens
    the vision model makes of a pixel value."""
    if not source.sees:
        return projections, [], 0.0
    used = range(source.spans[-1].start, len(source.layers))
    ends: set[int] = set()
    per_pixel = 0.0
    if pairs is not None:
        stream = LayerStream(source, pairs.batches[:1], device, dtype)
        ends = stream.read
        tokens = sum(hidden.shape[:-1].numel() for hidden in stream.flow.hidden)
        per_pixel = tokens / max(1, pairs.batches[0].get("pixel_values", torch.empty(0)).numel())

    def counts(index: int) -> bool:
        return index in used or any(index <= end for end in ends if end in source.span(index))

    rows = [row if counts(index) else [] for index, row in enumerate(projections)]
    return rows, [p for index, row in enumerate(projections) for p in row if not counts(index)], per_pixel
