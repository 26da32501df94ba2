"""The files of a checkpoint beside its factors, their permissions, and the absence of local paths."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A model with modelling code in its folder."""
    folder = save_tiny_model(tmp_path / "own", layers=2)
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own_llama"}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_modelling_code_comes_along_where_it_is_trusted(own_code: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(CompressOptions(str(own_code), output, trust_remote_code=True, **SMALL))
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.isfinite(model(torch.tensor([[0, 5, 9]])).logits).all()


def test_modelling_code_stays_where_it_is_not_trusted(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (folder / "setup.py").write_text("raise SystemExit(1)\n", encoding="utf-8")
    compress(CompressOptions(str(folder), tmp_path / "out", **SMALL))
    assert not (tmp_path / "out" / "setup.py").exists()


def test_tokenizer_files_and_chat_templates_come_along(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (folder / "additional_chat_templates").mkdir(mode=0o700)
    beside = {"additional_chat_templates/rag.jinja": "{{ messages }}", "qwen.tiktoken": "IQ== 0\n"}
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    compress(CompressOptions(str(folder), tmp_path / "out", **SMALL))
    assert {name: (tmp_path / "out" / name).read_text(encoding="utf-8") for name in beside} == beside
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert (tmp_path / "out" / "additional_chat_templates").stat().st_mode == fresh.stat().st_mode


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_of_the_umask(tiny_model: Path, tmp_path: Path, umask: int) -> None:
    output = tmp_path / "out"
    compress(CompressOptions(str(tiny_model), output, **SMALL))
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "again")
    files = [path for folder in (output, tmp_path / "again") for path in folder.iterdir() if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 2
    modes = {f"{path.parent.name}/{path.name}": stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_nothing_written_names_a_path_of_this_machine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "someone"
    model = home / "models" / "tiny-llama"
    shutil.copytree(tiny_model, model)
    text = home / "notes.txt"
    text.write_text("A line about nothing in particular.\n" * 200, encoding="utf-8")
    arguments = ["compress", str(model), f"--output-dir={home / 'out'}", "--dataset", str(text), "--ratio", "0.3"]
    arguments += ["--num-calibration-samples", "20", "--max-seq-length", "48"]
    monkeypatch.setattr("sys.argv", ["pgsvd-vllm", *arguments])
    assert main(arguments) == 0
    for path in (home / "out").iterdir():
        assert str(home).encode() not in path.read_bytes(), path.name
    section = json.loads((home / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["base_model"] == "tiny-llama"
    assert section["calibration"]["name"] == "notes.txt"
    command = "pgsvd-vllm compress tiny-llama --output-dir=out --dataset notes.txt --ratio 0.3"
    assert section["command"].startswith(command)


@pytest.mark.parametrize(("sensitivity", "key"), [("measured", "loss_nats"), ("forward", "stream_error")])
def test_the_reports_front_names_its_unit(tiny_model: Path, tmp_path: Path, sensitivity: str, key: str) -> None:
    compress(CompressOptions(str(tiny_model), tmp_path / "out", sensitivity=sensitivity, **SMALL))
    front = json.loads((tmp_path / "out" / "pgsvd_report.json").read_text(encoding="utf-8"))["front"]
    assert len(front) > 50
    assert {tuple(row) for row in front} == {("removed", key)}
