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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.outcome import Choice
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.records import LayerFactors, ModuleReport
from tests.conftest import save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, save_model

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}
TEXT = "".join(
    f"Line {i} tells of rivers, trade and music in town {i * 7 % 31}, {i % 9} days away.\n" for i in range(90)
)
CODE = {
    "names_own.py": "MODEL_TYPE = 'own_llama'\n",
    "configuration_own.py": """
from transformers import LlamaConfig
from .names_own import MODEL_TYPE
class OwnConfig(LlamaConfig):
    model_type = MODEL_TYPE
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A model with modelling code in its folder."""
    folder = save_tiny_model(tmp_path / "own", layers=2)
    for name, code in CODE.items():
        (folder / name).write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own_llama", "auto_map": AUTO_MAP}
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


def test_code_that_is_not_trusted_is_needed_by_no_copy(own_code: Path, tmp_path: Path) -> None:
    # The model is also one of transformers: its code is not needed, and the checkpoint does not refer to it.
    config = json.loads((own_code / "config.json").read_text(encoding="utf-8"))
    elsewhere = {"AutoModel": "someone/code--modeling_own.OwnModel"}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": AUTO_MAP | elsewhere}
    (own_code / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compress(CompressOptions(str(own_code), tmp_path / "out", **SMALL))
    assert not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["auto_map"] == elsewhere
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_leftovers_in_the_models_folder_are_not_copied(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (tmp_path / ".some-token").write_text("secret", encoding="utf-8")
    (folder / "x.txt").symlink_to(tmp_path / ".some-token")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    leftovers = ["pgsvd.safetensors.index.json", "pgsvd_report.json", "pytorch_model.bin.index.json", "pgsvd-x.json"]
    for name in leftovers:
        (folder / name).write_text('{"weight_map": {"a": "b.safetensors"}}', encoding="utf-8")
    output = tmp_path / "out"
    compress(CompressOptions(str(folder), output, dataset=(str(folder / "text.txt"),), **SMALL))
    check_data(open_checkpoint(output))
    written = {path.name for path in output.iterdir()}
    assert not written & {"x.txt", "pytorch_model.bin.index.json", "pgsvd-x.json"}
    assert json.loads((output / "pgsvd_report.json").read_text(encoding="utf-8"))["modules"]


def test_a_routers_bias_stays_in_float32(tmp_path: Path) -> None:
    row = next(row for row in ARCHITECTURES if row.name == "DeepSeek-V3")
    folder = save_model(row, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    dense = load_file(folder / "model.safetensors")
    bias = [name for name in dense if name.endswith("e_score_correction_bias")]
    for name in bias:
        dense[name].uniform_(7, 8)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"dataset": (str(tmp_path / "text.txt"),), "dtype": "bfloat16", "sensitivity": "uniform", **SMALL}
    compress(CompressOptions(str(folder), tmp_path / "out", **options))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = load_file(file)
    assert bias
    assert all(torch.equal(written[name], dense[name]) for name in bias)
    assert {str(t.dtype) for name, t in written.items() if name not in bias} == {"torch.bfloat16"}


def test_a_damaged_factor_is_found_before_it_is_published(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    plan = make_plan(CompressOptions(str(folder), tmp_path / "out", dataset=(str(tmp_path / "text.txt"),), **SMALL))
    state = open_state(plan, print)
    state.open_factors({})
    p = plan.projections.flat[0]
    factors = {"weight_v": torch.ones(2, p.in_features), "weight_u": torch.full((p.out_features, 2), float("nan"))}
    report = ModuleReport(p.name, p.out_features, p.in_features, 2, 0.1, 0.1, 0)
    state.save_factors(0, LayerFactors({p.name: factors}, {p.name: report}))
    with pytest.raises(CheckpointError, match=f"{p.name}.weight_u holds NaN or infinity"):
        write_checkpoint(plan, state, Choice(Allocation({}, {p.name: FactoredModule(2)}, 0.1, 0.1)))
    state.discard()


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
