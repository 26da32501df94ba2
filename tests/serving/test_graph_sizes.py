"""The CUDA graph sizes of factored models: chosen from configurations, and used by vLLM's own dispatchers."""

import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    LoRAConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.platforms import current_platform

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.serving.graph_sizes import capture_prompts, prompt_sizes
from pgsvd_vllm.serving.quant_config import PgsvdConfig

pytestmark = pytest.mark.usefixtures("vllm_world")
# vLLM's own for many requests.
OWN = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
MORE = [*OWN, *range(576, 1025, 64), *range(1152, 2049, 128)]
MIXED = CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> VllmConfig:
    return EngineArgs(model=str(tiny_model), max_model_len=256).create_engine_config()


@pytest.fixture
def make_config(engine: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Configurations as on an NVIDIA GPU of compute capability 8."""
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)

    def make(
        sizes: list[int] | None = None, mode: CUDAGraphMode = MIXED, tokens: int = 8192, requests: int = 256
    ) -> VllmConfig:
        config = copy.copy(engine)
        for part in ("compilation_config", "model_config", "scheduler_config"):
            setattr(config, part, copy.copy(getattr(engine, part)))
        config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = tokens, requests
        compilation: Any = config.compilation_config
        compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, mode
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sizes, None
        compilation.splitting_ops = list(CompilationConfig._attention_ops)
        config.model_config.enforce_eager = False
        config._set_cudagraph_sizes()
        return config

    return make


def chosen(config: VllmConfig) -> list[int]:
    """The sizes after a model with several factored layers was made."""
    for _ in range(2):
        capture_prompts(config)
    compilation = config.compilation_config
    assert compilation.max_cudagraph_capture_size == compilation.cudagraph_capture_sizes[-1]
    return list(compilation.cudagraph_capture_sizes)


def test_a_factored_model_captures_prompts(make_config: Any) -> None:
    config = make_config()
    assert config.compilation_config.cudagraph_capture_sizes == OWN
    assert chosen(config) == MORE
    # Few requests: vLLM's own end earlier, prompts do not, and no batch is padded much.
    few = chosen(make_config(requests=8))
    assert few[:5] == [1, 2, 4, 8, 16]
    assert few[-16:] == MORE[-16:]
    assert all(after - before <= max(8, before // (8 if before >= 256 else 4)) for before, after in pairwise(few))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"sizes": [1, 8, 64]}, [1, 8, 64]),
        ({"sizes": [*OWN, 1024]}, [*OWN, 1024]),
        ({"mode": CUDAGraphMode.FULL}, OWN),
        ({"mode": CUDAGraphMode.FULL_DECODE_ONLY}, OWN),
        ({"mode": CUDAGraphMode.PIECEWISE}, MORE),
        # Never more than a batch has; the last graph holds the largest batch.
        ({"tokens": 512}, OWN),
        ({"tokens": 1000}, [*OWN, *range(576, 961, 64), 1000]),
        ({"tokens": 2048}, MORE),
    ],
)
def test_sizes_of_a_configuration(options: dict[str, Any], sizes: list[int], make_config: Any) -> None:
    assert chosen(make_config(**options)) == sizes


def test_sizes_that_are_compiled_apart_are_captured(make_config: Any) -> None:
    """vLLM refuses those that a graph would pad."""
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    config = make_config()
    config.compilation_config.compile_sizes = [600, 3000]
    assert chosen(config) == sorted([*MORE, 600])
    CudagraphDispatcher(config).initialize_cudagraph_keys(MIXED)


def test_speculative_decoding_keeps_vllms_own(make_config: Any) -> None:
    config = make_config()
    config.speculative_config = SimpleNamespace()
    capture_prompts(config)
    assert config.compilation_config.cudagraph_capture_sizes == OWN


def test_a_stage_without_factors_decides_like_the_others(make_config: Any) -> None:
    """Pipeline stages send each other batches of the padded size."""
    config = make_config()
    with set_current_vllm_config(config):
        ReplicatedLinear(32, 32, quant_config=PgsvdConfig({}), prefix="model.layers.0.dense")
    assert config.compilation_config.cudagraph_capture_sizes == MORE


def test_adapters_get_fewer(make_config: Any) -> None:
    config = make_config()
    config.lora_config = LoRAConfig(max_lora_rank=16)
    assert chosen(config) == [size for size in MORE if size <= 1024]


@pytest.mark.parametrize(("value", "last"), [("0", 512), ("700", 640), ("1024", 1024), ("4096", 4096)])
def test_the_variable_limits_them(value: str, last: int, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSVD_GRAPH_TOKENS", value)
    assert chosen(make_config())[-1] == last


def test_a_wrong_variable_is_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSVD_GRAPH_TOKENS", "2k")
    with pytest.raises(InputError, match=r"^PGSVD_GRAPH_TOKENS=2k: must be a number of tokens, or 0"):
        capture_prompts(make_config())


@pytest.mark.parametrize(
    ("heads", "mode", "last"),
    # FlashAttention 3 takes 32 splits x heads x 128 x 4 bytes a token: 1 GiB for 2048 tokens of 32 heads.
    [(32, MIXED, 2048), (40, MIXED, 1536), (64, MIXED, 1024), (128, MIXED, 512), (128, CUDAGraphMode.PIECEWISE, 2048)],
)
def test_the_memory_of_attention_is_bounded(
    heads: int, mode: CUDAGraphMode, last: int, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(mode=mode)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "is_device_capability_family", lambda family, *_: family == 90)
    monkeypatch.setattr(type(config.model_config), "get_num_attention_heads", lambda *_: heads)
    monkeypatch.setattr(type(config.model_config), "get_head_size", lambda *_: 128)
    assert chosen(config)[-1] == last


def test_nothing_changes_on_a_cpu(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: False)
    assert chosen(config) == OWN


def test_both_dispatchers_run_prompts_in_graphs(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    config = make_config()
    first = CudagraphDispatcher(config)  # made before the model
    capture_prompts(config)
    first.initialize_cudagraph_keys(MIXED)
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", object())
    second = CudaGraphManager(config, torch.device("cpu"), MIXED, decode_query_len=1)
    second._graphs_captured = True
    for tokens, padded in ((512, 512), (513, 576), (1025, 1152), (1900, 1920), (2048, 2048)):
        mode, batch = first.dispatch(tokens)
        assert (mode, batch.num_tokens) == (CUDAGraphMode.PIECEWISE, padded)
        found = second.dispatch(1, tokens, None, 0)
        assert (found.cg_mode, found.num_tokens) == (CUDAGraphMode.PIECEWISE, padded)
    assert first.dispatch(2049)[0] == CUDAGraphMode.NONE
    assert second.dispatch(1, 2049, None, 0).cg_mode == CUDAGraphMode.NONE


def test_the_compile_hash_tells_sizes_apart(make_config: Any) -> None:
    before, config = make_config(), make_config()
    capture_prompts(config)
    assert before.compilation_config.compute_hash() != config.compilation_config.compute_hash()


def test_largest_batches() -> None:
    assert prompt_sizes([1, 2], 0, 8192) == [1, 2]
    assert prompt_sizes([1, 512], 2048, 600) == [1, 512, 576, 600]
    assert prompt_sizes([1, 512], 576, 8192, [8, 530, 577]) == [1, 512, 530, 576]
    assert prompt_sizes([1, 1024], 2048, 8192) == [1, 1024, *range(1152, 2049, 128)]
