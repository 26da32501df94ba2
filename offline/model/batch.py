"""The batch type: the arguments of one forward call of a model."""

import torch

TOKENS_PER_BATCH = 4096
# Batches are summed over in blocks, and the blocks' sums in their order: the result has the same bits whichever process
# sums a block. At most so many processes can share the samples.
BLOCKS = 8
# Tokens whose logits are in memory at a time; small buffers are also faster.
TOKENS_PER_CHUNK = 128
# Argument -> tensor: `input_ids` int64 [windows, length], and with images the other outputs of the model's processor.
Batch = dict[str, torch.Tensor]


def text_batches(ids: torch.Tensor) -> list[Batch]:
    """Split windows of text into batches of at most TOKENS_PER_BATCH tokens, but at least one window.

    Args:
        ids: int64 [windows, length]; may have no rows.
    """
    return [{"input_ids": part} for part in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))] if len(ids) else []


def block_of(number: int) -> int:
    """The block of a batch. Neighbours are in different ones, of which images and text have equal shares."""
    return (number + number // BLOCKS) % BLOCKS
