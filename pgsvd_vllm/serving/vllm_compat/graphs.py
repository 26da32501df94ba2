"""vLLM's rules for the sizes of CUDA graphs, asked and not copied."""

import copy
from collections.abc import Sequence

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform


def captures_pieces(config: VllmConfig) -> bool:
    """Whether batches with prompts run in piecewise CUDA graphs."""
    compilation = config.compilation_config
    return (
        current_platform.is_cuda_alike()
        and config.model_config is not None
        and compilation.mode == CompilationMode.VLLM_COMPILE
        and compilation.cudagraph_mode is not None
        and compilation.cudagraph_mode.mixed_mode() == CUDAGraphMode.PIECEWISE
    )


def default_sizes(config: VllmConfig) -> list[int]:
    """The numbers of tokens that vLLM would capture if the user had named none."""
    asked = copy.copy(config)
    asked.compilation_config = copy.copy(config.compilation_config)
    asked.compilation_config.cudagraph_capture_sizes = None  # type: ignore[assignment]
    asked.compilation_config.max_cudagraph_capture_size = None  # type: ignore[assignment]
    asked._set_cudagraph_sizes()  # private: there is no public question
    return captured_sizes(asked)


def captured_sizes(config: VllmConfig) -> list[int]:
    """The numbers of tokens of the graphs that will be captured, ascending."""
    return list(config.compilation_config.cudagraph_capture_sizes or [])


def compiled_sizes(config: VllmConfig) -> list[int]:
    """The numbers of tokens that the user has compiled apart; those within the largest graph have to be captured."""
    return [int(size) for size in config.compilation_config.compile_sizes or []]


def capture(config: VllmConfig, sizes: Sequence[int]) -> None:
    """Let the engine capture other sizes, ascending: it reads them after the model has been loaded."""
    config.compilation_config.cudagraph_capture_sizes = list(sizes)
    config.compilation_config.max_cudagraph_capture_size = sizes[-1]


def split_bytes(config: VllmConfig) -> int:
    """Bytes a token of the partial outputs that FlashAttention 3 allocates for batches up to the largest graph.

    With full graphs for decoding, vLLM has it split every batch of a graph's size the most: float32 [splits, heads,
    tokens, head size] (v1/attention/backends/flash_attn.py). 0 where that kernel does not run.
    """
    compilation = config.compilation_config
    is_hopper = current_platform.is_cuda() and current_platform.is_device_capability_family(90)
    if not compilation.cudagraph_mode.has_full_cudagraphs() or not is_hopper:
        return 0
    model, splits = config.model_config, config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    return 4 * splits * model.get_num_attention_heads(config.parallel_config) * model.get_head_size()
