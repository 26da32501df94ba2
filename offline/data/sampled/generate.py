"""Samples windows from a model: one batch of rows, each written by its script (see `sampled.scripts`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.data.sampled.decode import kv_cache, use_fast_attention
from pgsvd_vllm.offline.data.sampled.scripts import Script
from pgsvd_vllm.offline.model.draw import draw


class SampleError(InputError):
    """A model cannot sample text from itself; the message says why."""


class _Draw(LogitsProcessor):
    """Draws the next token of every row and lets its script decide; greedy decoding then takes that token.

    The draws of a row depend on its own seed alone, so that a row does not depend on the batch it is in.

    Args:
        scripts: of the rows.
        vocabulary: number of tokens; a model may have more embeddings.
        temperature: of the draws.
        tick: called after each token.
    """

    def __init__(
        self, scripts: Sequence[Script], vocabulary: int, temperature: float, tick: Callable[[], None]
    ) -> None:
        self._scripts, self._vocabulary = scripts, vocabulary
        self._temperature, self._tick = temperature, tick

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] with one finite entry a row."""
        shares = (scores[:, : self._vocabulary].float() / self._temperature).softmax(-1)
        if not is_finite(shares):
            raise SampleError("`dataset` self: the model's predictions are not finite; give a text instead")
        uniform = torch.tensor([script.chance.random() for script in self._scripts], device=shares.device)
        drawn = draw(shares, uniform).tolist()
        chosen = [script.next(token) for script, token in zip(self._scripts, drawn, strict=True)]
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(chosen)), chosen] = 0.0
        self._tick()
        return only


@torch.inference_mode()
def generate(
    model: Any,
    scripts: Sequence[Script],
    vocabulary: int,
    length: int,
    temperature: float,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Sample rows.

    Args:
        model: of transformers, on its device; its generation configuration is replaced.
        scripts: of the rows.
        vocabulary: number of tokens that may be drawn.
        length: of the rows.
        temperature: of the draws.
        tick: called after each token of all rows.

    Returns:
        int64 [rows, length].

    Raises:
        SampleError: the model's predictions are not finite.
    """
    model.generation_config = GenerationConfig()
    use_fast_attention(model)
    first = torch.tensor([script.next(-1) for script in scripts], device=model.device)
    draw = _Draw(scripts, vocabulary, temperature, tick)
    return model.generate(
        first[:, None],
        attention_mask=torch.ones_like(first[:, None]),
        generation_config=GenerationConfig(max_length=length, do_sample=False, eos_token_id=None, pad_token_id=0),
        logits_processor=LogitsProcessorList([draw]),
        past_key_values=kv_cache(model, length),
    ).cpu()
