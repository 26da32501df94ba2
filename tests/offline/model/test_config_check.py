"""A config.json that describes another model than the weights is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model

BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", layers=1)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, *culprits: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelSource(folder)
    assert [word for word in culprits if word not in str(caught.value)] == []


@pytest.mark.parametrize("section", ["", "text_config"])
def test_an_impossible_number_of_layers_is_refused(model: Path, section: str) -> None:
    count = {"num_hidden_layers": 10**12}
    edit_config(model, **({section: count} if section else count))
    refused(model, "config.json: num_hidden_layers is 1000000000000, but the model has only 11 tensors")


@pytest.mark.parametrize(
    "change",
    [{"architectures": ["MistralForCausalLM"]}, {"architectures": ["Qwen3ForCausalLM"]}, {"model_type": "mistral"}],
    ids=str,
)
def test_two_names_of_different_models_are_refused(model: Path, change: dict[str, Any]) -> None:
    edit_config(model, **change)
    refused(model, "config.json: architectures has ", "which vLLM serves", "ForCausalLM; correct the one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "no_such_act"}, "it knows no hidden_act 'no_such_act'"),
        ({"rope_parameters": {"rope_type": "no_such_rope"}}, "it knows no rope_type 'no_such_rope'"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], not a name"),
        ({"model_type": 5}, "model_type is 5, not a name"),
    ],
    ids=str,
)
def test_a_name_that_transformers_does_not_know_is_shown(model: Path, change: dict[str, Any], reason: str) -> None:
    edit_config(model, **change)
    refused(model, f"{model}/config.json: ", reason)


def test_a_bias_that_the_model_would_leave_out_is_refused(model: Path) -> None:
    add_tensor(model, BIAS, torch.ones(128))
    refused(model, f"model.safetensors: tensor {BIAS} is a bias, and LlamaForCausalLM has none there", "attention_bias")


@pytest.mark.parametrize("name", [BIAS, "model.layers.0.self_attn.bias", "visual.blocks.0.bias"])
def test_harmless_biases_are_kept(model: Path, name: str) -> None:
    """Zeros change nothing; a causal mask and parts of another model belong to no layer."""
    add_tensor(model, name, torch.zeros(128) if name == BIAS else torch.ones(128))
    assert name in ModelSource(model).weights.unused
