"""A checkpoint becomes a dense model that transformers loads without the format, with the products of its factors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME
from pgsvd_vllm.format.writer import write_index
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.convert.export import export
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.e2e.checkpoints import truncated, write_checkpoint

INDEX = "model.safetensors.index.json"


def tensors_of(folder: Path, index: str) -> dict[str, torch.Tensor]:
    names = set(json.loads((folder / index).read_text())["weight_map"].values())
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16, in two files, with one projection left dense."""
    folder = tmp_path_factory.mktemp("factored")
    dense = save_tiny_model(folder / "dense", layers=2)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return write_checkpoint(
        dense, folder / "out", lambda name, w: None if name.endswith("1.mlp.up_proj") else truncated(w, 24), 300_000
    )


def test_weights_are_the_products_and_others_unchanged(factored: Path, tmp_path: Path) -> None:
    made = export(factored, tmp_path / "dense")
    before, after = tensors_of(factored, INDEX_NAME), tensors_of(tmp_path / "dense", INDEX)
    modules = open_checkpoint(factored).modules
    assert made.projections == len(modules) == 13
    assert made.nbytes == sum(tensor.nbytes for tensor in after.values())
    assert made.nbytes_before == sum(tensor.nbytes for tensor in before.values())
    for name in modules:
        exact = before.pop(f"{name}.weight_u").double() @ before.pop(f"{name}.weight_v").double()
        weight = after.pop(f"{name}.weight")
        assert weight.dtype == torch.bfloat16
        # Half a unit in the last of eight bits, and what float32 adds.
        assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("LlamaConfig", {"form": "pivot"}),
        ("LlamaConfig", {"bits": "4", "form": "factors"}),
        ("GPT2Config", {}),
        ("GPT2Config", {"bits": "8", "form": "factors"}),
        ("Qwen2MoeConfig", {"include": ("experts", "lm_head")}),
    ],
    ids=["pivot", "int4", "transposed", "transposed-int8", "experts-head"],
)
def test_the_dense_model_computes_the_same(name: str, more: dict[str, object], tmp_path: Path) -> None:
    model = save_model(next(row for row in ARCHITECTURES if row.config == name), tmp_path / "model")
    few = {"num_calibration_samples": 32, "max_seq_length": 64, "dataset": ("python-docs",), "refine": 0.0}
    compress(CompressOptions(str(model), tmp_path / "out", ratio=0.3, **few, **more))  # type: ignore[arg-type]
    assert main(["export", str(tmp_path / "out"), "-o", str(tmp_path / "dense")]) == 0
    ids = torch.arange(40).view(2, 20) + 3
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    # A process that does not know the format.
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1], dtype=torch.float32); ids = torch.arange(40).view(2, 20) + 3; "
        "torch.save(m(ids).logits.detach(), sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dense"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr, done.stderr
    assert "UNEXPECTED" not in done.stderr, done.stderr
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


def test_the_dense_model_can_be_compressed_again(factored: Path, tmp_path: Path) -> None:
    export(factored, tmp_path / "dense")
    few = {"num_calibration_samples": 32, "max_seq_length": 64, "dataset": ("python-docs",), "refine": 0.0}
    options = CompressOptions(str(tmp_path / "dense"), tmp_path / "again", ratio=0.1, **few)  # type: ignore[arg-type]
    assert compress(options).output.is_dir()


def test_an_existing_output_is_refused(factored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense").mkdir()
    assert main(["export", str(factored), "-o", str(tmp_path / "dense")]) == 2
    assert f"--output-dir {tmp_path / 'dense'}: already exists" in capsys.readouterr().err


def test_a_dense_model_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_model), "-o", str(tmp_path / "dense")]) == 2
    assert "not a pgsvd checkpoint" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_weight_that_is_not_finite_leaves_nothing(value: float, factored: Path, tmp_path: Path) -> None:
    shutil.copytree(factored, tmp_path / "bad")
    index = json.loads((tmp_path / "bad" / INDEX_NAME).read_text())
    for name, filled in (("weight_u", value), ("weight_v", 4.0)):
        file = tmp_path / "bad" / index["weight_map"][f"model.layers.0.mlp.down_proj.{name}"]
        tensors = load_file(file)
        tensors[f"model.layers.0.mlp.down_proj.{name}"].fill_(filled)
        save_file(tensors, file, metadata={"format": "pt"})
    write_index(tmp_path / "bad", index["weight_map"], index["metadata"]["total_size"])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj"):
        export(tmp_path / "bad", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
