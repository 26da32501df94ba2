"""The skeleton's tensors are those that transformers loads, and missing ones are named before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, save_model

ROWS = {row.name: row for row in ARCHITECTURES}
CPU = torch.device("cpu")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["DeepSeek-V3", "GLM-4.5 MoE", "Gemma 4, text", "Apertus"])
def test_stored_buffers_are_loaded_as_by_transformers(tmp_path: Path, name: str) -> None:
    """A router's bias, a scale of a layer: calibration without them takes other experts and other activations."""
    buffers = ("e_score_correction_bias", "layer_scalar", "act_fn.beta")

    def draw(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.endswith(buffers):
                tensor.uniform_(7, 8)

    folder = edit(save_model(ROWS[name], tmp_path / "model"), draw)
    source = ModelSource(folder)
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        source.load_outer(CPU, dtype)
        found = dict(source.model.named_buffers())
        stored = [key for key, _ in expected.named_buffers() if key.endswith(buffers)]
        assert stored
        for key in stored:
            assert 7 <= found[key].float().mean() <= 8
            assert found[key].dtype == expected.get_buffer(key).dtype, key
            assert torch.equal(found[key], expected.get_buffer(key)), key
        index = len(source.layers) - 1
        with source.layer(index, CPU, dtype) as layer:
            path = source.paths[index]
            assert {n: p.dtype for n, p in layer.named_parameters()} == {
                n: p.dtype for n, p in expected.get_submodule(path).named_parameters()
            }


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop(LAST), "missing"),
        (lambda t: t.update({LAST: t[LAST][1:].clone()}), "(127, 320), the architecture needs (128, 320)"),
        (lambda t: t.update({LAST: t[LAST].T.contiguous()}), "(320, 128), the architecture needs (128, 320)"),
    ],
)
def test_a_layer_that_does_not_fit_is_named_at_once(
    tmp_path: Path, change: Callable[..., object], culprit: str
) -> None:
    folder = edit(save_tiny_model(tmp_path / "model", layers=2), change)
    with pytest.raises(InputError) as caught:
        ModelSource(folder)
    assert f"tensor {LAST}" in str(caught.value)
    assert culprit in str(caught.value)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("row", ["Mixtral", "DeepSeek-V3"])
def test_an_expert_that_is_missing_is_named_at_once(tmp_path: Path, row: str, experts: bool) -> None:
    folder = save_model(ROWS[row], tmp_path / "model")
    lost = next(name for name in sorted(load_file(folder / "model.safetensors"), reverse=True) if ".experts.3." in name)
    edit(folder, lambda t: t.pop(lost))
    with pytest.raises(InputError, match=r"tensor model\.layers\.\d\.mlp\.experts"):
        ModelSource(folder, experts=experts)
