"""CUDA graphs for prompts of factored models.

Outside of graphs the GPU waits for the CPU that launches: a factored layer has two to four GEMMs in place of one, and a
prompt of 512 to 1900 tokens ran at half of the dense speed on an H100 (docs/kernels.md). vLLM captures graphs of up to
512 tokens, 1024 on some GPUs; where the user leaves that to vLLM, factored models get more.
"""

import logging
import os
from collections.abc import Sequence

from vllm.config import VllmConfig

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.serving.vllm_compat.graphs import (
    capture,
    captured_sizes,
    captures_pieces,
    compiled_sizes,
    default_sizes,
    split_bytes,
)

VARIABLE = "PGSVD_GRAPH_TOKENS"
MOST_TOKENS = 2048
# With adapters vLLM captures every size with and without them.
MOST_WITH_LORA = 1024
# Most memory that FlashAttention 3 may take for a batch of the largest size.
SPLIT_BYTES = 1 << 30
# Where vLLM's own sizes end, at twice the number of requests or 512, these go on: a batch is padded by a quarter at
# most, or 8 tokens, above 256 tokens by an eighth.
SIZES = (*range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, 1024, 64), *range(1024, 1 << 20, 128))
logger = logging.getLogger("vllm.pgsvd")


def graph_tokens() -> int:
    """The largest graph for prompts that PGSVD_GRAPH_TOKENS allows, in tokens; 0 for vLLM's own sizes.

    Raises:
        InputError: the variable is not a number of tokens.
    """
    text = os.environ.get(VARIABLE, str(MOST_TOKENS))
    if not text.isdecimal():
        raise InputError(f"{VARIABLE}={text}: must be a number of tokens, or 0 for vLLM's own CUDA graph sizes")
    return int(text)


def prompt_sizes(captured: Sequence[int], most: int, batched: int, required: Sequence[int] = ()) -> list[int]:
    """The sizes to capture.

    Args:
        captured: vLLM's own, ascending.
        most: tokens of the largest graph.
        batched: the most tokens of a batch.
        required: to capture as well, as far as they are within the largest graph.

    Returns:
        `captured` and larger sizes, ascending; the last one holds the largest batch if that has at most `most` tokens.
    """
    most = min(most, batched)
    if most <= captured[-1]:
        return list(captured)
    added = {size for size in SIZES if captured[-1] < size <= most}
    if most == batched:
        added.add(batched)
    last = max(added, default=captured[-1])
    return [*captured, *sorted(added | {size for size in required if captured[-1] < size <= last})]


def capture_prompts(config: VllmConfig) -> None:
    """Have the engine capture graphs for prompts, unless the user has chosen the sizes.

    Called when a linear layer is made, factored or not, so that pipeline stages without factors decide like the others;
    only the first call changes anything. With speculative decoding, where two models share the sizes, they stay vLLM's.

    Raises:
        InputError: PGSVD_GRAPH_TOKENS is not a number of tokens.
    """
    most = graph_tokens()
    if not captures_pieces(config) or config.speculative_config is not None:
        return
    own = default_sizes(config)
    if not own or captured_sizes(config) != own:
        return
    if config.lora_config is not None:
        most = min(most, MOST_WITH_LORA)
    each = split_bytes(config)
    if each:
        most = min(most, SPLIT_BYTES // each)
    sizes = prompt_sizes(own, most, config.scheduler_config.max_num_batched_tokens, compiled_sizes(config))
    if sizes == own:
        return
    capture(config, sizes)
    logger.info(
        "CUDA graphs of up to %d tokens instead of vLLM's %d: factored layers have more GEMMs to launch (%s=0 keeps "
        "vLLM's sizes)%s",
        *(sizes[-1], own[-1], VARIABLE),
        f"; FlashAttention takes up to {sizes[-1] * each / 2**30:.1f} GiB for such a batch" if each else "",
    )
