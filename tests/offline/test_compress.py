"""The pipeline on tiny models: the checkpoint, its description, and files that must not change."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import ChoiceError, InputError, bytes_text
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.free_memory import free_memory
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning import fit_memory
from pgsvd_vllm.offline.planning.fit_memory import fit_gradients
from pgsvd_vllm.offline.planning.memory import stage_bytes
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.conftest import compress_to, save_tiny_model
from tests.offline.whole import layer_grams

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pgsvd_report.json").read_text())


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def matrix_of(written: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """The dense weight [out, in] of a factored projection, by the definition of the format."""
    parts = {kind: t.double().numpy() for kind in "uvpc" if (t := written.get(f"{name}.weight_{kind}")) is not None}
    if "u" in parts:
        return parts["u"] @ parts["v"]
    pivots = written[f"{name}.pivots"].tolist()
    whole = np.empty((len(parts["p"]) + len(parts["c"]), parts["p"].shape[1]))
    whole[pivots] = parts["p"]
    whole[[i for i in range(len(whole)) if i not in pivots]] = parts["c"] @ parts["p"]
    return whole


def check_output(model: Path, output: Path) -> None:
    """Check everything that must hold for any checkpoint, from its files alone."""
    dense, written = tensors_of(model), tensors_of(output)
    modules = section_of(output)["modules"]
    assert modules
    considered = {row["name"] for row in report_of(output)["modules"]}
    assert modules.keys() <= considered
    before = after = total_after = 0
    for name, tensor in dense.items():
        stem = name.removesuffix(".weight")
        if stem in modules:
            rank, form = modules[stem]["rank"], modules[stem]["form"]
            (out, width), kinds = tensor.shape, {"factors": ("u", "v"), "pivot": ("p", "c")}[form]
            parts = {kind: written.pop(f"{stem}.weight_{kind}") for kind in kinds}
            shapes = {"u": (out, rank), "v": (rank, width), "p": (rank, width), "c": (out - rank, rank)}
            for kind, part in parts.items():
                assert part.shape == shapes[kind]
            size = sum(part.numel() for part in parts.values())
            if form == "pivot":
                size += len(written.pop(f"{stem}.pivots"))
            assert size < tensor.numel(), f"{stem} grew"
        else:
            kept = written.pop(name)
            assert torch.equal(kept, tensor.to(kept.dtype)), f"{name} was changed"
            size = kept.numel()
        total_after += size
        # The ratio is a share of all projections; ignored ones count as kept.
        if stem.endswith("_proj") and name.endswith(".weight"):
            before += tensor.numel()
            after += size
    assert not written, f"tensors that the dense model lacks: {sorted(written)}"
    total = sum(t.numel() for t in dense.values())
    # config.json has six digits.
    assert section_of(output)["ratio"]["linear"] == pytest.approx(1 - after / before, abs=1e-6)
    assert section_of(output)["ratio"]["total"] == pytest.approx(1 - total_after / total, abs=1e-6)
    assert report_of(output)["parameters"] == {"before": total, "after": total_after}
    check_data(open_checkpoint(output))
    assert not output.with_name(output.name + ".partial").exists()


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16, the dtype of most published models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_tiny_model(tmp_path_factory.mktemp("half") / "base", layers=2, seed=5)
    folder = base.with_name("model")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("bias", "tie", "options"),
    [
        (False, True, {"ratio": 0.25}),
        (False, True, {"ratio": 0.25, "sensitivity": "uniform"}),
        (False, True, {"ratio": 0.25, "sensitivity": "forward"}),
        (False, False, {"ratio": 0.6}),
        (True, True, {"tolerance": 0.35}),
        (True, False, {"tolerance": 0.5, "ignore": ("*.down_proj", "model.layers.0.*")}),
    ],
)
def test_the_checkpoint_matches_its_report_and_config(
    tmp_path: Path, bias: bool, tie: bool, options: dict[str, Any]
) -> None:
    model = save_tiny_model(tmp_path / "model", bias=bias, tie=tie, layers=2)
    output = tmp_path / "out"
    result = compress(CompressOptions(str(model), output, **SMALL, **options))
    check_output(model, output)
    modules, report = section_of(output)["modules"], report_of(output)["modules"]
    assert [row["name"] for row in report] == [m.name for m in result.modules]
    assert len(report) == (6 if "ignore" in options else 14)
    if "ignore" in options:
        assert not any(name.endswith("down_proj") or ".layers.0." in name for name in modules)
    for row in report:
        assert row["rank"] == (modules[row["name"]]["rank"] if row["name"] in modules else None)
        if row["rank"] is None:
            assert (row["error"], row["optimum"], row["sweeps"]) == (0, 0, 0)
        else:
            # Gram matrices are float32 on disk.
            assert row["optimum"] ** 2 - 2.0**-22 <= row["error"] ** 2
            if section_of(output)["sensitivity"] == "uniform":
                # Within half a per cent by ALS, and rounding of the factors to float32.
                assert row["error"] <= row["optimum"] * 1.005 + 1e-6
                assert row["optimum"] <= section_of(output)["tolerance"]["language"]
    if "tolerance" in options:
        assert section_of(output)["tolerance"] == {"language": options["tolerance"]}
    else:
        # The ranks of a small model are coarse: one rank of the largest matrix is 1/600 of all parameters.
        assert section_of(output)["ratio"]["linear"] == pytest.approx(options["ratio"], abs=0.01)
    # The tokenizer is copied, the index of the dense weights is not.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert not (output / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_report_errors_equal_those_of_the_written_factors(
    half_model: Path, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    output = tmp_path / "out"
    options = CompressOptions(str(half_model), output, ratio=0.4, dtype=dtype, dataset=("python-docs",), **SMALL)
    plan = make_plan(options)
    compress(options)
    check_output(half_model, output)
    written = tensors_of(output)
    assert {t.dtype for name, t in written.items() if not name.endswith(".pivots")} == {expected}
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    source = ModelSource(half_model)
    stream = LayerStream(source, text_batches(plan.data.windows.ids), torch.device("cpu"), plan.settings.compute_dtype)
    rows = {row["name"]: row for row in report_of(output)["modules"]}
    checked = 0
    for index, projections in enumerate(find_projections(source).layers):
        found = layer_grams(stream, index, projections)
        grams = {name: total.matrix().numpy() for name, total in found.sums.items()}
        for p in projections:
            if rows[p.name]["rank"] is None:
                continue
            c = grams[found.leader[p.name]]
            w = source.weights.read(f"{p.name}.weight").double().numpy()
            residual = w - matrix_of(written, p.name)
            error = np.sqrt(np.trace(residual @ c @ residual.T) / np.trace(w @ c @ w.T))
            # The errors differ by the rounding of the Gram matrix to float32 on disk.
            assert rows[p.name]["error"] == pytest.approx(error, rel=c.shape[0] * 2.0**-24)
            checked += 1
    assert checked >= 10


def test_forward_sensitivity_if_gradients_exceed_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    plan = make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=0, **SMALL))
    assert fit_gradients(plan, lines.append) is plan
    free = free_memory(torch.device("cpu"))
    assert free is not None
    needed = stage_bytes(plan)["gradients"]
    assert free > needed
    monkeypatch.setattr(fit_memory, "available", lambda _plan: needed - 1)
    lighter = fit_gradients(plan, lines.append)
    assert lighter.settings.sensitivity == "forward"
    assert lighter.settings.sequential
    assert lighter.settings.storages[0].form == "pivot"
    assert "gradients" not in stage_bytes(lighter)
    assert len(lines) == 1
    shown, least = (bytes_text(needed - less) for less in (0, 1))
    assert lines[0].startswith(f"WARNING: measuring loss gradients needs about {shown} of memory, {least} are avail")
    for options in ({"sensitivity": "measured"}, {"sensitivity": "uniform"}, {"tolerance": 0.3}, {"baseline": "svd"}):
        requested = make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=0, **SMALL, **options))
        assert fit_gradients(requested, lines.append) is requested
    assert len(lines) == 1


def test_a_larger_ratio_gives_smaller_size_and_larger_error(tiny_model: Path, tmp_path: Path) -> None:
    sizes, errors = [], []
    for ratio in (0.2, 0.5, 0.8):
        result = compress(CompressOptions(str(tiny_model), tmp_path / f"{ratio}", ratio=ratio, **SMALL))
        sizes.append(result.parameters_after)
        errors.append(sum(m.error for m in result.modules))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert len(set(sizes)) == 3


def test_equal_options_give_equal_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress(CompressOptions(str(tiny_model), tmp_path / name, ratio=0.3, seed=seed, **SMALL))
    weights = [{k: v for k, v in digest(tmp_path / n).items() if k.endswith("safetensors")} for n in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.slow
def test_ratio_is_met_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    few = ("--num-calibration-samples", "8", "--max-seq-length", "512")
    compress_to(tmp_path / "out", smollm2, "--ratio", "0.2", *few)
    check_output(smollm2, tmp_path / "out")
    assert abs(section_of(tmp_path / "out")["ratio"]["linear"] - 0.2) <= 0.005
    assert section_of(tmp_path / "out")["sensitivity"] == "measured"


def test_dry_run_writes_nothing(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "neighbour").write_text("x")
    before, model_before = digest(tmp_path), digest(tiny_model)
    output = tmp_path / "sub" / "out"
    assert main(["compress", str(tiny_model), "-o", str(output), "--dry-run", "--max-seq-length", "64"]) == 0
    text = capsys.readouterr().out
    assert "21 projections of 3 layers" in text
    assert "40 windows of 64 tokens from the model itself (self, sampled in about" in text
    assert f"would write: {output}" in text
    assert digest(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["neighbour"]
    assert digest(tiny_model) == model_before


def test_a_model_without_a_limit_of_tokens_takes_any_length(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": -1}))
    plan = make_plan(CompressOptions(str(model), tmp_path / "out", ratio=0.2, **SMALL))
    assert plan.data.windows.ids.shape[1] == SMALL["max_seq_length"]


def test_the_model_folder_is_only_read(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=1)
    before = digest(model)
    compress(CompressOptions(str(model), tmp_path / "out", ratio=0.3, **SMALL))
    assert digest(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_config_json_names_the_calibration_text(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("".join(f"Line {i} of a text about nothing in particular.\n" for i in range(200)))
    output = tmp_path / "out"
    compress(CompressOptions(str(tiny_model), output, ratio=0.3, dataset=(str(text),), **SMALL))
    calibration = section_of(output)["calibration"]
    assert calibration["name"] == "text.md"
    assert calibration["tokens"] == 20 * 48
    assert len(calibration["sha256"]) == 64


def test_an_unreachable_target_keeps_the_calibration(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"`tolerance` 0\.0001: no projection .*--resume"):
        compress(CompressOptions(str(tiny_model), output, tolerance=0.0001, **SMALL))
    assert not output.exists()
    with pytest.raises(InputError, match=r"`ratio` 0\.9999: more than this model can give.*--resume"):
        compress(CompressOptions(str(tiny_model), output, ratio=0.9999, resume=True, **SMALL))
    assert not output.exists()
    compress(CompressOptions(str(tiny_model), output, ratio=0.3, resume=True, **SMALL))
    check_output(tiny_model, output)


def test_a_target_loss_is_kept_and_used(tiny_model: Path, tmp_path: Path) -> None:
    few = {"num_calibration_samples": 32, "max_seq_length": 64, "dataset": ("python-docs",), "refine": 0.0}
    small = CompressOptions(str(tiny_model), tmp_path / "small", target_loss=0.02, **few)  # type: ignore[arg-type]
    front = compress(small).choice
    assert front.front is not None
    losses = front.front.losses
    assert front.allocation.loss == max(loss for loss in losses if loss <= 0.02)
    assert section_of(tmp_path / "small")["sensitivity"] == "measured"
    too_small = CompressOptions(str(tiny_model), tmp_path / "none", target_loss=1e-12, **few)  # type: ignore[arg-type]
    with pytest.raises(ChoiceError, match="`target_loss` 1e-12: too small"):
        compress(too_small)
