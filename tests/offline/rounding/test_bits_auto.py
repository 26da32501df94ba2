"""`--bits auto` and `--target-bytes` on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pgsvd_vllm.cli import main
from pgsvd_vllm.cli.compress import byte_count
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.quantization import INT8, int4
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.offline.calibration.loss_metric import DAMPING
from pgsvd_vllm.offline.compress import calibrate, compress, measured_spectra
from pgsvd_vllm.offline.options import CompressOptions, check_options
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.rounding.error_compensated import round_matrix
from pgsvd_vllm.offline.rounding.forms import damped

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "dataset": ("python-docs",), "refine": 0}


def options(model: Path, output: Path, **changes: Any) -> CompressOptions:
    return CompressOptions(str(model), output, **{**SMALL, "bits": "auto", **changes})


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("bits", "share"), [("auto", 0.9), ("auto", 0.45), ("16", 0.9), ("16", 0.6), ("8", 0.28)])
def test_the_written_weights_have_the_size(bits: str, share: float, tiny_model: Path, tmp_path: Path) -> None:
    target = round(share * weight_bytes(tiny_model))
    output = tmp_path / "out"
    said: list[str] = []
    compress(options(tiny_model, output, bits=bits, target_bytes=target), said.append)
    assert 0.85 * target < weight_bytes(output) <= target
    check_data(open_checkpoint(output))
    assert "bits per weight" in next(line for line in said if line.startswith("ranks by"))


def test_projections_of_one_input_are_stored_alike(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(options(tiny_model, output, ratio=0.7))
    modules = open_checkpoint(output).modules
    used = set()
    for layer in range(3):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            found = [modules.get(f"model.layers.{layer}.{name}") for name in names]
            schemes = {tuple({s.key for s in m.schemes.values()}) if m is not None else () for m in found}
            assert len(schemes) == 1
            used |= schemes
    assert len(used) > 1
    report = json.loads((output / "pgsvd_report.json").read_text())
    assert report["front"][0].keys() == {"bytes_removed", "loss_nats"}
    card = (output / "README.md").read_text()
    assert "quantization | INT" in card
    assert "bits per weight" in card


def test_a_mild_size_is_met_by_bits(tiny_model: Path, tmp_path: Path) -> None:
    """Halving the bytes by 8 bits loses far less than any rank would."""
    result = compress(options(tiny_model, tmp_path / "out", ratio=0.7))
    allocation = result.choice.allocation
    assert {scheme.key for scheme in allocation.schemes} == {"int8"}
    assert sum(module.is_dense for module in allocation.modules.values()) > 15


@pytest.mark.parametrize("sensitivity", ["measured", "forward"])
def test_the_predicted_loss_is_that_of_the_rounded_weight(sensitivity: str, tiny_model: Path, tmp_path: Path) -> None:
    plan = make_plan(options(tiny_model, tmp_path / "out", ratio=0.5, sensitivity=sensitivity))
    state = open_state(plan)
    calibrate(plan, state)
    rounding = measured_spectra(plan, state).rounding
    assert rounding is not None
    for index, row in enumerate(plan.projections.layers):
        data, found = state.load_layer(index), state.load_sensitivity(index, sensitivity)
        for p in row:
            weight = plan.source.weights.tensor(f"{p.path}.weight").double()
            gram = data.grams[data.leader[p.name]].double(torch.device("cpu"))
            schemes = [scheme for scheme in (INT8, int4(32)) if scheme.fits(p.in_features)]
            for scheme in schemes:
                error = round_matrix(weight, damped(gram), scheme).matrix() - weight
                if sensitivity == "measured":
                    moment = found.moments[p.name].double(torch.device("cpu"))
                    moment += DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
                    metric = (gram / data.tokens + found.grams[p.name].double(torch.device("cpu"))) / 2
                    loss = 0.5 * float((moment @ error @ metric * error).sum())
                else:
                    factor = float(found.energy[p.name].sum() / data.energy[p.name].sum())
                    loss = 0.5 * factor * float((error @ gram * error).sum())
                assert rounding.losses[p.name][scheme.key] == pytest.approx(loss, rel=1e-6)
            assert rounding.losses[p.name]["int8"] < 0.02 * rounding.losses[p.name]["int4-32"]
    state.discard()


def test_other_sizes_reuse_the_calibration(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    first = options(tiny_model, tmp_path / "a", ratio=0.6, calibration=folder)
    compress(first)
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert len([file for file in written if "rounding" in file.name]) == 3
    compress(replace(first, output=tmp_path / "b", ratio=0.75))
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def test_the_plan_says_what_is_chosen_from(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--dataset", "python-docs", "--dry-run"]
    assert main([*command, "--bits", "auto", "--ratio", "0.75"]) == 0
    said = capsys.readouterr().out
    assert "quantization: none, INT8, INT4 in groups of 32, INT4 in groups of 64" in said
    assert "size: 8.00 bits per weight of the projections" in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500M", 500_000_000), ("3.5G", 3_500_000_000), ("4GiB", 4 * 1024**3), ("2kB", 2000)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "G", "4X", "-3M", "1.2.3G", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        byte_count(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--bits auto: needs a size"),
        ({"ratio": 0.5, "baseline": "svd"}, "--bits auto: needs measured losses"),
        ({"ratio": 0.5, "sensitivity": "uniform"}, "--bits auto: needs measured losses"),
        ({"ratio": 0.5, "costs": Path("table.json")}, "--bits auto: is about size"),
        ({"ratio": 0.5, "include": ("experts",)}, "--bits auto: MoE experts are not quantized"),
        ({"ratio": 0.5, "target_bytes": 1000}, "--target-bytes: determines how much"),
        ({"target_bytes": 0}, "--target-bytes 0: must be positive"),
        ({"target_bytes": 1000, "include": ("lm_head",)}, "--target-bytes: an LM head"),
        ({"target_bytes": 1000, "bits": "16", "baseline": "svd"}, "--target-bytes: needs measured losses"),
    ],
)
def test_what_cannot_be_chosen_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        check_options(options(Path("model"), tmp_path / "out", **changes))


@pytest.mark.parametrize(("size", "message"), [(1000, "--target-bytes 1000: too small"), (10**12, "already")])
def test_a_size_that_no_choice_has_is_refused(size: int, message: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(options(tiny_model, tmp_path / "out", target_bytes=size))
