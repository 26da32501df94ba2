"""Calibrates the LM head: the Gram matrix of its inputs and the weight of each row (see `factors.lm_head`)."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.linalg import (
    GramSum,
    exponent_of,
    gram_root,
    is_silent,
    naming,
    overflow,
    spectrum,
    times_power,
)
from pgsvd_vllm.offline.model.batch import TOKENS_PER_CHUNK, Batch, block_of
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.records import LMHeadCalibration

# Tokens that take part; every token costs logits of the size of the vocabulary.
HEAD_TOKENS = 32768
# Least weight of a row, as a share of the mean weight.
FLOOR = 1.0
# Rows of the LM head in one float64 block.
HEAD_ROWS = 8192


@dataclass
class HeadSums:
    """The LM head's inputs and outputs, over a block of batches or over all.

    Attributes:
        block: of the batches.
        gram: of the inputs; None without tokens.
        weight: float32 [vocabulary], sum of p (1 - p); None without tokens.
        tokens: in the sums.
    """

    block: int = 0
    gram: GramSum | None = None
    weight: torch.Tensor | None = None
    tokens: int = 0

    def merge(self, other: "HeadSums") -> None:
        """Add the sums of another block."""
        if other.gram is None or other.weight is None:
            return
        if self.gram is None or self.weight is None:
            self.gram, self.weight = GramSum(other.gram.width, other.gram.device), torch.zeros_like(other.weight)
        self.gram.merge(other.gram)
        self.weight += other.weight
        self.tokens += other.tokens


def head_batches(batches: Sequence[Batch]) -> set[int]:
    """The numbers of the batches that take part: the first ones with HEAD_TOKENS tokens."""
    ends = itertools.accumulate((batch["input_ids"].numel() for batch in batches), initial=0)
    return {number for number, before in zip(range(len(batches)), ends, strict=False) if before < HEAD_TOKENS}


@torch.no_grad()
def run_lm_head(stream: LayerStream, head: Projection, numbers: Collection[int]) -> Iterator[HeadSums]:
    """Run the LM head on last hidden states of the calibration set.

    Args:
        stream: all of whose layers have run.
        head: the LM head of its model.
        numbers: of the batches to run.

    Yields:
        The sums of each block.

    Raises:
        InputError: the LM head's inputs or outputs are not finite.
    """
    source = stream.source
    source.load_lm_head(stream.device, stream.dtype)
    module: nn.Module = source.model.get_submodule(head.path)
    last = len(source.layers) - 1
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        chosen = [number for number in stream.batches if number in numbers]
        for block, members in itertools.groupby(chosen, block_of):
            total, tokens = GramSum(head.in_features, stream.device), 0
            weight = torch.zeros(head.out_features, device=stream.device)
            for number in members:
                for logits in _logits(stream, number, stream.batches[number], last):
                    p = logits.flatten(0, -2).float().softmax(-1)
                    weight += (p * (1 - p)).sum(0)
                    tokens += len(p)
                if not (all(is_finite(x) for x in inputs) and is_finite(weight)):
                    raise overflow(f"{head.name}: its input or output", stream.dtype)
                for x in inputs:
                    total.add(x.flatten(0, -2).float())
                inputs.clear()
            yield HeadSums(block, total, weight, tokens)
    finally:
        handle.remove()


def lm_head_calibration(source: ModelSource, head: Projection, found: HeadSums) -> LMHeadCalibration:
    """The calibration of the LM head from the sums over all batches.

    Raises:
        InputError: the calibration set has fewer tokens than the LM head has inputs, or the outputs are all 0.
    """
    if found.gram is None or found.weight is None or found.tokens < head.in_features:
        raise InputError(
            f"`include` lm_head: {found.tokens} tokens are too little calibration data; {head.name} has "
            f"{head.in_features} inputs and needs at least as many"
        )
    weight = found.weight / found.tokens
    summed = found.gram.matrix().to(weight.device)
    unit = times_power(summed, -exponent_of(summed)).float()
    gram = unit.double()  # the energies belong to the stored matrix
    with naming(head.name):
        root = gram_root(gram)
        square = gram_of_rows(source.weights.tensor(f"{head.path}.weight"), row_scale(weight))
        energy = spectrum(root.T @ square @ root)
    if is_silent(float(square.trace()), gram, energy):
        raise InputError(f"`include` lm_head: {head.name} gives 0 on the calibration data, which says nothing; omit it")
    return LMHeadCalibration(unit, weight, energy)


def _logits(stream: LayerStream, number: int, batch: dict[str, torch.Tensor], last: int) -> Iterator[torch.Tensor]:
    """Logits [..., vocabulary] of a batch; a batch of text runs a few tokens at a time to limit memory."""
    kept = stream.flow.kept[number]
    if len(kept) > 1 or "pixel_values" in batch:
        yield stream.output(number, kept).logits
        return
    for row, states in zip(batch["input_ids"].to(stream.device), kept[last], strict=True):
        for ids, hidden in zip(row.split(TOKENS_PER_CHUNK), states.split(TOKENS_PER_CHUNK), strict=True):
            yield stream.logits(ids[None], hidden[None])


def row_scale(weight: torch.Tensor) -> torch.Tensor:
    """The factors of the LM head's rows, roots of their weights, times a power of two.

    Args:
        weight: [vocabulary], `LMHeadCalibration.weight`.

    Returns:
        float64 [vocabulary, 1], mean of the squares at least 1/4; ones if all weights are 0, as of a model that is
        certain of every token.
    """
    w = weight.double()
    if not w.any():
        return torch.ones_like(w)[:, None]
    w = times_power(w, -2 * (exponent_of(w.mean()) // 2))
    return w.clamp_min(FLOOR * w.mean()).sqrt()[:, None]


def weighted_blocks(matrix: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weighted rows of a matrix in blocks of HEAD_ROWS, on the device of `scale`.

    Args:
        matrix: [rows, columns].
        scale: float64 [rows, 1], from `row_scale`.

    Yields:
        The slice of rows and the block float64 [<= HEAD_ROWS, columns].
    """
    for start in range(0, len(matrix), HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, len(matrix)))
        yield rows, scale[rows] * matrix[rows].to(scale.device).double()


def gram_of_rows(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """S^T S of the weighted rows S, computed in blocks.

    Args:
        matrix: [rows, columns].
        scale: float64 [rows, 1], from `row_scale`.

    Returns:
        float64 [columns, columns], on the device of `scale`.
    """
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=scale.device)
    for _, block in weighted_blocks(matrix, scale):
        total += block.T @ block
    return total
