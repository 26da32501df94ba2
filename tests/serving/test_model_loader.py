"""Broken and foreign checkpoints through vLLM: one clear error, in either load format."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME
from tests.e2e.engine import greedy, try_engine

FORMATS = ("pgsvd", "auto")
JOB = ([[5, 6, 7]], greedy(2))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the one weight file and the index of a checkpoint, so that both agree."""
    index = json.loads((folder / INDEX_NAME).read_text())
    (file_name,) = set(index["weight_map"].values())
    tensors = load_file(folder / file_name)
    change(tensors)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})
    index["weight_map"] = dict.fromkeys(tensors, file_name)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def without(tensor: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[tensor]

    return change


@pytest.fixture
def copy(tiny_compressed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_compressed, tmp_path / "copy")


@pytest.fixture(scope="module")
def module(tiny_compressed: Path) -> str:
    """A factored projection that vLLM merges with others."""
    return next(name for name in open_checkpoint(tiny_compressed).modules if name.endswith("up_proj"))


def engine_error(folder: Path, load_format: str) -> str:
    """The log of an engine that must fail to start."""
    done = try_engine(folder, [JOB], load_format=load_format)
    assert done.returncode != 0, "the engine served a broken checkpoint"
    return done.log


# These are refused while the configuration is made, before anything that a second engine in the
# process could stumble over: one process for all of them.
START_EACH = """
import sys
from vllm import LLM
for folder, load_format in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        LLM(model=folder, load_format=load_format, dtype="float32", enforce_eager=True, max_model_len=64)
    except Exception as error:
        print("OUTCOME", " ".join(str(error).split()), flush=True)
    else:
        print("OUTCOME served", flush=True)
"""


@pytest.fixture(scope="module")
def refusals(
    tiny_compressed: Path, module: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, str]]:
    """(fault, load format) -> the folder and what vLLM said."""
    folder = tmp_path_factory.mktemp("faults")
    extra = module.replace("up_proj", "side_proj")
    faults = {
        "missing": without(f"{module}.weight_c"),
        "extra": lambda tensors: tensors.update({f"{extra}.weight_v": torch.zeros(4, 128)}),
    }
    for fault, change in faults.items():
        change_tensors(shutil.copytree(tiny_compressed, folder / fault), change)
    cases = [(fault, load_format) for fault in faults for load_format in FORMATS]
    arguments = [argument for fault, load_format in cases for argument in (str(folder / fault), load_format)]
    done = subprocess.run(
        [sys.executable, "-c", START_EACH, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    said = [line.removeprefix("OUTCOME ") for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    assert len(said) == len(cases), done.stdout[-3000:] + done.stderr[-3000:]
    return {case: (folder / case[0], text) for case, text in zip(cases, said, strict=True)}


@pytest.mark.parametrize("load_format", FORMATS)
def test_a_missing_factor_is_named(
    refusals: dict[tuple[str, str], tuple[Path, str]], module: str, load_format: str
) -> None:
    folder, said = refusals["missing", load_format]
    assert f"{folder}: tensor {module}.weight_c is missing" in said


@pytest.mark.parametrize("load_format", FORMATS)
def test_an_extra_factor_is_named(
    refusals: dict[tuple[str, str], tuple[Path, str]], module: str, load_format: str
) -> None:
    _, said = refusals["extra", load_format]
    extra = module.replace("up_proj", "side_proj")
    assert f"{extra}.weight_v belongs to no module of the table in config.json" in said


def test_factors_that_do_not_fit_the_layer_are_named(copy: Path, module: str) -> None:
    """Factors consistent among themselves, but of a narrower layer than config.json describes."""

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.weight_p"] = tensors[f"{module}.weight_p"][:, :-8].contiguous()

    change_tensors(copy, narrow)
    log = engine_error(copy, "pgsvd")
    assert f"tensor {module}.weight_p: this layer has 128 inputs" in log


def test_a_missing_dense_tensor_is_named(copy: Path) -> None:
    """vLLM's own check of parameters that nothing filled, which it skips for quantized models unless asked."""
    change_tensors(copy, without("model.norm.weight"))
    assert "config.json promises" in engine_error(copy, "auto")
    # Without the promise, as a checkpoint of another writer may be, the loader still finds it.
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["tensors"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "model.norm.weight" in engine_error(copy, "pgsvd").rpartition("not initialized from checkpoint")[2][:200]


def test_a_dense_checkpoint_is_refused_with_what_to_do(tiny_model: Path) -> None:
    log = engine_error(tiny_model, "pgsvd")
    assert f"--load-format pgsvd: {tiny_model} is not a pgsvd checkpoint" in log
    assert f"pgsvd-vllm compress {tiny_model} -o DIR" in log


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as vLLM's workers set it up."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    from pgsvd_vllm.plugin import register

    register()
    store = tmp_path_factory.mktemp("world") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("world")
def test_the_loader_checks_for_itself(copy: Path, module: str) -> None:
    """A checkpoint from the hub has no folder to check when the configuration is made."""
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = VllmConfig(
        model_config=ModelConfig(model=str(copy), dtype="float32", max_model_len=64, enforce_eager=True),
        load_config=LoadConfig(load_format="pgsvd"),
        device_config=DeviceConfig("cpu"),
    )
    change_tensors(copy, without(f"{module}.weight_p"))
    loader = get_model_loader(config.load_config)
    with (
        set_current_vllm_config(config),
        pytest.raises(CheckpointError, match=rf"tensor {module}\.weight_p is missing"),
    ):
        loader.load_model(vllm_config=config, model_config=config.model_config)
