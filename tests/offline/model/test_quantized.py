"""Quantized sources, unmerged adapters and reserved names are refused by the headers, before any work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model

UP = "model.layers.0.mlp.up_proj"
FP4 = torch.float4_e2m1fn_x2
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("dense") / "model", layers=1)


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test changes."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    """Add or replace tensors of the first layer's up projection, by the rest of their names; `weight` None drops it."""
    stored = load_file(folder / "model.safetensors")
    stored.update({f"{UP}.{name}": tensor for name, tensor in tensors.items()})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder: Path, *culprits: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelSource(folder)
    assert [word for word in culprits if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, FP4, *FP8], ids=str
)
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("config_dtype", ["bfloat16", None])
def test_weights_of_other_dtypes_are_refused(
    model: Path, dtype: torch.dtype, scales: bool, config_dtype: str | None
) -> None:
    weight = torch.ones(320, 128).to(dtype) if dtype != FP4 else torch.ones(320, 64, dtype=torch.uint8).view(FP4)
    with_tensors(model, weight=weight, **({"weight_scale": torch.ones(320, 1)} if scales else {}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": config_dtype}))
    refused(model, str(model / "model.safetensors"), f"{UP}.weight is stored as", "start from the dense model")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_tensors_outside_the_layers_are_checked_too(model: Path, name: str) -> None:
    stored = load_file(model / "model.safetensors")
    stored[name] = stored[name].to(torch.float8_e5m2)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, f"{name} is stored as F8_E5M2")


@pytest.mark.parametrize(
    "name",
    [
        *("qweight", "qzeros", "scales", "g_idx", "SCB", "weight.absmax", "weight.quant_map", "weight_format"),
        *("weight.quant_state.bitsandbytes__nf4", "weight_scale", "weight_scale_inv", "weight_zero_point"),
        *("weight_packed", "input_scale", "weight_scale_2", "weight.nested_absmax"),
        *(
            "weight_scales",
            "experts.gate_up_proj_blocks",
            "experts.gate_up_proj_scales",
            "weight_qdata",
            "weight._data",
        ),
    ],
)
def test_tensors_beside_quantized_weights_are_refused(model: Path, name: str) -> None:
    with_tensors(model, **{name: torch.ones(4)})
    refused(model, f"{UP}.{name}", "model.safetensors", "start from the dense model")


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.default.weight", "base_layer.weight"])
def test_unmerged_adapters_are_refused(model: Path, name: str) -> None:
    with_tensors(model, **{name: torch.ones(4, 4)})
    refused(model, f"{UP}.{name}", "merge_and_unload")


@pytest.mark.parametrize("name", ["weight_v", "weight_u", "weight_p", "weight_c", "pivots"])
def test_names_of_factors_are_refused(model: Path, name: str) -> None:
    with_tensors(model, **{name: torch.ones(4, 4)})
    refused(model, f"{UP}.{name}", "compressed already", "weight normalization")


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq, by quantization_config"),
        ({"quantization_config": {"quant_method": "pgsvd"}}, "pgsvd"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors, by compression_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8, by text_config.quantization_config"),
        ({"a": {"b": {"compression_config": {}}}}, "a.b.compression_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    ],
    ids=str,
)
def test_quantization_sections_at_any_depth_are_refused(model: Path, change: dict[str, Any], culprit: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    refused(model, "already compressed or quantized", culprit)


def test_integer_buffers_and_unknown_tensors_are_kept(model: Path) -> None:
    kept = {"rotary_emb.inv_freq": torch.ones(4), "bias_mask": torch.ones(4, 4, dtype=torch.bool)}
    with_tensors(model, **kept, position_ids=torch.arange(4), weight_decay=torch.ones(1))
    assert {f"{UP}.{name}" for name in (*kept, "position_ids")} <= set(ModelSource(model).weights.unused)
