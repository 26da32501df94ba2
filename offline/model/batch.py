"""The arguments of one call of a model."""

import torch

TOKENS_PER_BATCH = 4096
# The arguments of one call of a model: `input_ids` int64 [windows, length] and, where there are images, what the
# model's processor makes of them.
Batch = dict[str, torch.Tensor]


def text_batches(ids: torch.Tensor) -> list[Batch]:
    """Windows of text, int64 [windows, length], as batches of at most TOKENS_PER_BATCH tokens."""
    return [{"input_ids": part} for part in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))] if len(ids) else []
