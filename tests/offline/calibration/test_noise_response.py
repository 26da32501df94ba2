"""Noise responses against the whole model's response to independent noise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model


def hidden_states(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The residual stream after the first layer."""
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[1].double()


def test_responses_equal_those_of_small_errors(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2, seed=4)
    ids = torch.randint(2, 258, (64, 40), generator=torch.Generator().manual_seed(0))
    source = ModelSource(folder)
    row = find_projections(source).layers[0]
    stream = LayerStream(source, text_batches(ids), torch.device("cpu"), torch.float32)
    found = noise_responses(stream, 0, row, seed=0)
    assert list(found) == [p.name for p in row]

    # Noise of another draw in the whole model, small enough for a linear response.
    plain = hidden_states(AutoModelForCausalLM.from_pretrained(folder), ids)
    size = plain.square().sum(-1)
    for p in row:
        model = AutoModelForCausalLM.from_pretrained(folder)
        added: list[torch.Tensor] = []

        def add_noise(
            _m: torch.nn.Module, _a: object, y: torch.Tensor, added: list[torch.Tensor] = added
        ) -> torch.Tensor:
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * 0.05 * y.std()
            added.append(noise)
            return y + noise

        model.get_submodule(p.name).register_forward_hook(add_noise)
        moved = (hidden_states(model, ids) - plain).square().sum(-1)
        expected = (moved / size).mean() / added[0].square().sum(-1).mean()
        assert found[p.name] == pytest.approx(float(expected), rel=0.15), p.name
    # The noise of a projection that adds to the stream changes the stream by itself.
    assert found[row[-1].name] == pytest.approx(float((1 / size).mean()), rel=0.1)


def test_a_projection_with_zero_output_has_no_response(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(folder)
    source = ModelSource(folder)
    stream = LayerStream(source, text_batches(torch.randint(2, 258, (4, 20))), torch.device("cpu"), torch.float32)
    found = noise_responses(stream, 0, find_projections(source).layers[0], seed=0)
    assert found["model.layers.0.mlp.up_proj"] == 0
    assert found["model.layers.0.mlp.down_proj"] == 0
    assert found["model.layers.0.self_attn.o_proj"] > 0
