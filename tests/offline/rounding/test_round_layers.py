"""`--bits` on a tiny model: what is written, and that all of it is what the report says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions, check_options

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "dataset": ("python-docs",), "refine": 0}


def options(model: Path, output: Path, **changes: Any) -> CompressOptions:
    return CompressOptions(str(model), output, ratio=0.3, **SMALL, **changes)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def weight_of(folder: Path, name: str) -> torch.Tensor:
    """The dense weight of a module of the table, float64."""
    module, tensors = open_checkpoint(folder).modules[name], tensors_of(folder)
    stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in module.suffixes}
    return reconstruct(dequantized(stored, module.schemes))


@pytest.mark.parametrize(
    ("bits", "form", "most"), [("8", None, 8.3), ("8", "factors", 8.3), ("fp8", None, 8.3), ("4", None, 4.6)]
)
def test_every_projection_is_quantized(
    bits: str, form: str | None, most: float, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    result = compress(options(tiny_model, output, bits=bits, form=form))
    checkpoint = open_checkpoint(output)
    check_data(checkpoint)
    assert checkpoint.quantization_config["version"] == 2
    assert len(checkpoint.modules) == 21
    form = form or ("factors" if bits == "4" else "pivot")
    assert 0 < len(checkpoint.factored) < 21 or form == "pivot"
    assert {m.form for m in checkpoint.modules.values()} <= {form, "dense"}
    for module in checkpoint.modules.values():
        assert set(module.schemes) == set(module.matrices)
        assert {scheme.num_bits for scheme in module.schemes.values()} == {4 if bits == "4" else 8}
    # Packed tensors count as the parameters that they stand for.
    plain = compress(options(tiny_model, tmp_path / "plain", form=form))
    assert result.parameters_before == plain.parameters_before
    assert abs(result.parameters_after - plain.parameters_after) < 0.02 * plain.parameters_before
    size = sum(info.nbytes for name, info in checkpoint.tensors.items() if name.endswith(("_packed", "_scale")))
    elements = sum(m * n for m, n, _ in map(checkpoint.shape, checkpoint.modules))
    assert 8 * size / elements < most * (1 - result.ratios["linear"] + 0.02) + 0.5
    assert main(["verify", str(output)]) == main(["inspect", str(output)]) == 0
    assert "bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["8", "4"])
def test_transformers_computes_with_the_written_matrices(bits: str, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(options(tiny_model, output, bits=bits))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for name in open_checkpoint(output).modules:
        weight = weight_of(output, name)
        x = torch.randn(3, weight.shape[1])
        assert torch.allclose(model.get_submodule(name)(x).double(), x.double() @ weight.T, atol=1e-4)


def test_eight_bits_add_little_to_the_errors_of_the_report(tiny_model: Path, tmp_path: Path) -> None:
    for bits in ("16", "8"):
        compress(options(tiny_model, tmp_path / bits, bits=bits, form="factors"))
    plain, rounded = (
        {row["name"]: row for row in json.loads((tmp_path / bits / "pgsvd_report.json").read_text())["modules"]}
        for bits in ("16", "8")
    )
    for name, row in rounded.items():
        assert row["rank"] == plain[name]["rank"]
        assert 0 < row["error"] < (plain[name]["error"] ** 2 + 0.005**2) ** 0.5 + 0.001


def test_the_plan_names_the_quantization(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--dataset", "python-docs", "--dry-run"]
    assert main([*command, "--bits", "4"]) == 0
    assert "quantization: INT4 in groups of 32" in capsys.readouterr().out
    assert main(command) == 0
    assert "quantization" not in capsys.readouterr().out


def test_a_saved_model_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    compress(options(tiny_model, tmp_path / "out", bits="4"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    first, second = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert set(first) - set(second) <= {"lm_head.weight"}
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name]), name
    open_checkpoint(tmp_path / "again")


def test_ignored_projections_stay_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    compress(options(tiny_model, tmp_path / "out", bits="8", ignore=("*.down_proj",)))
    names = open_checkpoint(tmp_path / "out").modules
    assert names
    assert not any("down_proj" in name for name in names)
    source, written = tensors_of(tiny_model), tensors_of(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(source[name], written[name])


def test_other_bits_reuse_the_calibration(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    first = options(tiny_model, tmp_path / "a", bits="8", form="factors", calibration=folder)
    compress(first)
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    compress(replace(first, output=tmp_path / "b", bits="fp8"))
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    # Both round the same factors.
    for name in open_checkpoint(tmp_path / "b").modules:
        one, other = weight_of(tmp_path / "a", name), weight_of(tmp_path / "b", name)
        assert 0 < float((one - other).norm()) < 0.1 * float(one.norm())


def test_a_model_with_biases_keeps_them(tmp_path: Path) -> None:
    from tests.conftest import save_tiny_model

    model = save_tiny_model(tmp_path / "model", bias=True, layers=2)
    compress(options(model, tmp_path / "out", bits="4"))
    source, written = tensors_of(model), tensors_of(tmp_path / "out")
    biases = [name for name in source if name.endswith(".bias")]
    assert biases
    assert all(torch.equal(source[name], written[name]) for name in biases)


@pytest.mark.parametrize(
    ("changes", "message"), [({"bits": "5"}, "--bits 5"), ({"bits": "8", "include": ("experts",)}, "--include experts")]
)
def test_what_cannot_be_quantized_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        check_options(CompressOptions("model", tmp_path / "out", **changes))
