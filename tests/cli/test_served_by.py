"""`compress` says what vLLM makes of an architecture that is not in the tested table."""

from pathlib import Path
from typing import Any

from pgsvd_vllm.cli import main
from pgsvd_vllm.cli.served_by import ask_vllm
from tests.e2e.architectures import HEADS, Architecture, save_model


def test_a_module_that_vllm_lacks_is_named(tiny_model: Path) -> None:
    layers = [f"model.layers.{i}" for i in range(3)]
    names = [f"{layer}.{leaf}" for layer in layers for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.router")]
    found = ask_vllm(str(tiny_model), names)
    assert found["reason"] == ""
    assert found["model_class"] == "LlamaForCausalLM"
    assert found["missing"] == ["'model.layers.*.mlp.router'"]
    assert found["dense"] == []


def test_dry_run_warns_of_an_untested_architecture(tmp_path: Path, capsys: Any, one_thread: None) -> None:
    (tmp_path / "model").mkdir()
    model = save_model(Architecture("Gemma", "GemmaConfig", HEADS), tmp_path / "model")
    few = ("--num-calibration-samples", "8", "--max-seq-length", "64", "--dry-run")
    assert main(["compress", str(model), "-o", str(tmp_path / "out"), *few]) == 0
    said = capsys.readouterr().out
    assert "WARNING: the architecture gemma is not among the tested ones (docs/models.md)" in said
    assert "GemmaForCausalLM takes the factors of all 21 modules" in said
