"""The mapping of renamed, stacked and transposed checkpoint tensors against from_pretrained."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.hf.weight_mapping import stored_tensors
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.source import ModelSource
from tests.e2e.architectures import ARCHITECTURES, save_model

ROWS = {row.name: row for row in ARCHITECTURES}
# Stacked MoE experts, a renamed LM head, transposed weights, and a model without any of these.
NAMES = ["Mixtral", "Qwen2-MoE", "GPT-NeoX, Pythia", "GPT-2", "Llama 2, 3", "DeepSeek-V2, V2-Lite"]


@pytest.fixture(params=NAMES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(ROWS[request.param], tmp_path_factory.mktemp("model"))


def test_every_tensor_equals_that_of_from_pretrained(folder: Path) -> None:
    source = ModelSource(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = set(expected.all_tied_weights_keys or {})
    names = [name for name, _ in expected.named_parameters() if name not in tied]
    assert len(names) > 20
    for name in names:
        weight = expected.get_parameter(name)
        assert torch.equal(source.weights.tensor(name), weight.T if name in source.weights.transposed else weight), name
    stored = [stored for name in names for stored in source.weights.stored_as(name)]
    assert sorted(stored) == sorted(source.weights.tensors)


def test_transposed_layers_become_nn_linear(tmp_path: Path) -> None:
    source = ModelSource(save_model(ROWS["GPT-2"], tmp_path / "model"))
    row = find_projections(source).layers[0]
    assert [(p.name.rpartition("h.0.")[2], p.out_features, p.in_features) for p in row] == [
        ("attn.c_attn", 384, 128),
        ("attn.c_proj", 128, 128),
        ("mlp.c_fc", 512, 128),
        ("mlp.c_proj", 128, 512),
    ]
    x = torch.randint(0, 258, (2, 9))
    expected = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    source.load_outer(torch.device("cpu"), torch.float32)
    source.load_lm_head(torch.device("cpu"), torch.float32)
    for index in range(3):
        source._load(source.layers[index], f"{source.paths[index]}.", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(source.model(x).logits, expected(x).logits)


def test_names_without_the_base_models_prefix_are_found(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints have such names."""
    folder = save_model(ROWS["GPT-2"], tmp_path / "model")
    names = [name.removeprefix("transformer.") for name in ModelSource(folder).weights.tensors]
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = stored_tensors(model, names)
    assert found["transformer.h.1.attn.c_attn.weight"].names == ("h.1.attn.c_attn.weight",)
    assert set(found) <= set(model.state_dict())


def test_a_missing_moe_expert_is_named(tmp_path: Path) -> None:
    folder = save_model(ROWS["Mixtral"], tmp_path / "model")
    source = ModelSource(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    lost = source.weights.stored[name].names[3]
    del source.weights.tensors[lost]
    source.weights.stored = stored_tensors(source.model, list(source.weights.tensors))
    source.load_outer(torch.device("cpu"), torch.float32)
    with (
        pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        source.layer(1, torch.device("cpu"), torch.float32),
    ):
        pass
