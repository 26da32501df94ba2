"""Defaults are resolved once, and a resumed run keeps the resolved settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.errors import ChoiceError, InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning import fit_memory
from tests.conftest import save_tiny_model

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}


class Stopped(Exception):
    """Raised by a progress callback to end a run."""


def stop_at(beginning: str) -> Callable[[str], None]:
    def say(line: str) -> None:
        if line.startswith(beginning):
            raise Stopped

    return say


@pytest.mark.parametrize(("begun", "free"), [("measured", 2**50), ("forward", 0)])
def test_a_resumed_run_keeps_its_sensitivities(
    begun: str, free: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that is free at the time of the resume does not matter."""
    output = tmp_path / "out"
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: free)
    with pytest.raises(Stopped):
        compress(CompressOptions(str(tiny_model), output, **SMALL), say=stop_at("ranks by"))
    measured = sorted(path.name for path in tmp_path.glob(f"out.partial/layers/*.{begun}.safetensors"))
    assert len(measured) == 3
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: 2**50 - free)
    compress(CompressOptions(str(tiny_model), output, resume=True, **SMALL))
    section = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["sensitivity"] == begun


def test_a_resumed_run_keeps_the_defaults_of_the_machine_where_it_began(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text: dict[str, Any] = {"dataset": ("python-docs",), "max_seq_length": 48, "ratio": 0.3, "refine": 0}
    begun = CompressOptions(str(tiny_model), output, num_calibration_samples=20, serve_on="gpu", **text)
    with pytest.raises(Stopped):
        compress(begun, say=stop_at("ranks by"))
    # As the defaults of another machine would be.
    compress(CompressOptions(str(tiny_model), output, resume=True, **text))
    section = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["serve_on"] == "gpu"
    assert {module["form"] for module in section["modules"].values()} == {"factors"}
    assert section["calibration"]["tokens"] == 20 * 48


def test_finished_factors_survive_a_resume_with_less_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    options = CompressOptions(str(tiny_model), output, **SMALL)
    monkeypatch.setattr("pgsvd_vllm.offline.compress.write_checkpoint", lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        compress(options)
    monkeypatch.undo()
    # Three layers, factored and distilled.
    assert len(list(tmp_path.glob("out.partial/factors-*/*.safetensors"))) == 6
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: 0)
    monkeypatch.setattr("pgsvd_vllm.offline.factors.problem.closed_form", None)  # nothing is left to solve
    compress(CompressOptions(str(tiny_model), output, resume=True, **SMALL))
    assert (output / "config.json").is_file()


def test_a_calibration_folder_keeps_its_sensitivities(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ratio on the same folder needs no gradients, and so no memory for them."""
    folder = tmp_path / "measured"
    compress(CompressOptions(str(tiny_model), tmp_path / "first", calibration=folder, **SMALL))
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: 0)
    output = tmp_path / "second"
    compress(CompressOptions(str(tiny_model), output, calibration=folder, **{**SMALL, "ratio": 0.5}))
    section = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["sensitivity"] == "measured"


def test_a_sensitivity_that_is_asked_for_wins_on_resume(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        compress(CompressOptions(str(tiny_model), output, **SMALL), say=stop_at("ranks by"))
    compress(CompressOptions(str(tiny_model), output, resume=True, sensitivity="forward", **SMALL))
    section = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["sensitivity"] == "forward"


def test_resume_is_advised_where_another_value_may_do(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ChoiceError, match=r"`ratio` 0\.9999: .*repeat with --resume"):
        compress(CompressOptions(str(tiny_model), tmp_path / "out", **{**SMALL, "ratio": 0.9999}))


def test_resume_is_not_advised_where_it_cannot_help(tmp_path: Path) -> None:
    """Another dtype needs another calibration, which --resume refuses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_tiny_model(tmp_path / "base", layers=1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1e7)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    with pytest.raises(InputError, match="float16") as caught:
        compress(CompressOptions(str(folder), tmp_path / "out", dtype="float16", baseline="svd", **SMALL))
    assert "--resume" not in str(caught.value)
