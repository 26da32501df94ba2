"""Judges whether calibration windows hold enough different text to calibrate on."""

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.tokens import Windows

# Tokens of the sequences that are compared to find repetition.
SEQUENCE = 8
# Prose repeats few of its sequences; a tenth of different ones is a text that was copied ten times.
LEAST_DIFFERENT = 0.1
# The exponential of the entropy of English letters is about 18, of digits 10, of DNA 4.
LEAST_EFFECTIVE_TOKENS = 8


def check_worth(windows: Windows, prefix: int) -> list[str]:
    """Refuse windows that teach nothing about the model's inputs.

    Args:
        windows: of one data set, at least one.
        prefix: number of special tokens that start every window.

    Returns:
        Why the text is probably worth little, one line each; empty for ordinary text.

    Raises:
        InputError: all tokens are the same, or all windows are.
    """
    ids, name = windows.ids, windows.name
    counts = torch.unique(ids[:, prefix:], return_counts=True)[1]
    if len(counts) == 1 and ids.shape[1] > prefix + 1:
        raise InputError(
            f"--dataset {name}: the calibration text is one token repeated; give text like the model's future input"
        )
    if len(ids) > 1 and bool((ids == ids[0]).all()):
        raise InputError(
            f"--dataset {name}: all {len(ids)} windows of the calibration text are the same; give text that does not "
            "repeat itself"
        )
    found = []
    share = counts / counts.sum()
    effective = float(torch.exp(-(share * share.log()).sum()))
    if effective < LEAST_EFFECTIVE_TOKENS:
        found.append(
            f"{name} consists of few different tokens ({len(counts)}, as varied as {effective:.1f} equally frequent "
            "ones); the compressed model fits other text badly: give text like the model's future input"
        )
    different, sequences = _different_sequences(ids)
    if different < LEAST_DIFFERENT * sequences:
        found.append(
            f"{name} repeats itself (only {different} of {sequences} sequences of {SEQUENCE} tokens are different); "
            "the compressed model fits other text badly: give more different text"
        )
    return found


def _different_sequences(ids: torch.Tensor) -> tuple[int, int]:
    """The number of different sequences of `SEQUENCE` tokens in windows, and of all of them."""
    if ids.shape[1] < SEQUENCE:
        return 1, 1
    # A hash of 64 bits; products wrap around.
    hashes = torch.zeros(len(ids), ids.shape[1] - SEQUENCE + 1, dtype=torch.int64)
    for offset in range(SEQUENCE):
        hashes = hashes * 6364136223846793005 + ids[:, offset : offset + hashes.shape[1]]
    return len(hashes.unique()), hashes.numel()
