"""The loader's mark on vLLM's compile hash: graphs of one load format must not be served in the other."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import (
    CompilationMode,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.model_loader import get_model_loader

import pgsvd_vllm
from pgsvd_vllm.plugin import register
from tests.conftest import save_tiny_model
from tests.e2e.checkpoints import truncated, write_checkpoint

pytestmark = pytest.mark.usefixtures("vllm_world")


def loaded(folder: Path, load_format: str, mode: CompilationMode) -> VllmConfig:
    """The configuration of an engine once its model is loaded, as the compiler sees it."""
    register()
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), dtype="float32", max_model_len=64),
        load_config=LoadConfig(load_format=load_format),
        device_config=DeviceConfig("cpu"),
    )
    config.compilation_config.mode = mode  # afterwards: on CPU vLLM changes what it is given
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    return config


@pytest.fixture(scope="module")
def partly_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose last layer is dense."""
    folder = tmp_path_factory.mktemp("partly-dense")
    model = save_tiny_model(folder / "model")
    return write_checkpoint(model, folder / "out", lambda name, w: None if ".2." in name else truncated(w, 16))


@pytest.mark.parametrize("mode", [CompilationMode.VLLM_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE])
def test_load_formats_have_compile_hashes_of_their_own(
    partly_dense: Path, mode: CompilationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU workers do
    own, plain = (loaded(partly_dense, load_format, mode) for load_format in ("pgsvd", "auto"))
    marks = own.additional_config["pgsvd"]
    assert marks.get("opaque_dense_layers") == (4 if mode == CompilationMode.VLLM_COMPILE else None)
    assert marks["load_format"] == "pgsvd"
    assert marks["version"] == pgsvd_vllm.__version__
    assert own.compute_hash() != plain.compute_hash()
    assert own.compute_hash() == loaded(partly_dense, "pgsvd", mode).compute_hash()
