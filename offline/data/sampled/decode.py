"""Batched decoding in transformers where all windows grow in step, fast enough on CPUs to sample a calibration text.

Each step gives every window one token. Two things that cost more than the model's GEMMs on a CPU are replaced: a KV
cache that is copied in every step, and the attention of a single query in bf16 (docs/dev/log.md).
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from pgsvd_vllm.hf.transformers_compat import DynamicCache, DynamicLayer, sdpa_attention_forward, sdpa_mask

ATTENTION = "pgsvd_decode"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query per head, by two batched GEMMs; everything else goes to torch's kernel.

    Args:
        module: of the attention.
        query: [batch, heads, queries, head].
        key: [batch, KV heads, tokens, head].
        value: [batch, KV heads, tokens, head of values].
        attention_mask: None if the queries see all keys.
        options: of transformers, such as `scaling`.

    Returns:
        [batch, queries, heads, head of values].
    """
    unusual = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if query.shape[2] != 1 or attention_mask is not None or unusual or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, width = query.shape
    shared = key.shape[1]
    scaling = width**-0.5 if options.get("scaling") is None else options["scaling"]
    grouped = query.reshape(batch * shared, heads // shared, width)
    scores = torch.bmm(grouped, key.flatten(0, 1).mT) * scaling
    shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    output = torch.bmm(shares.to(value.dtype), value.flatten(0, 1))
    return output.view(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _FixedLayer(DynamicLayer):
    """The KV cache of one layer, whose memory is allocated once.

    Args:
        length: of the windows.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, KV heads, tokens, head]; returns all of them."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = (s.new_empty(*s.shape[:2], self._length, s.shape[3]) for s in (key_states, value_states))
            self._buffers = keys, values
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


def kv_cache(model: Any, length: int) -> Cache:
    """An empty cache for windows of `length` tokens; layers other than full attention have transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_FixedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def use_fast_attention(model: Any) -> None:
    """Let a model on a CPU use `_attention`, if it would use torch's kernel otherwise."""
    if model.device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
