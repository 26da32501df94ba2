"""Quantized checkpoints become dense ones with the weights that their numbers stand for, or nothing is written."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.convert.dequantize import dequantize
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
# Nibble i of a word of AWQ belongs to this column of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("dense") / "model", layers=1)


def quantized_copy(
    dense: Path, folder: Path, section: dict[str, Any], quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
) -> tuple[Path, Tensors]:
    """A copy of the model with quantized projections, and the weights that they stand for, in float64.

    Args:
        dense: the model.
        folder: to write.
        section: quantization_config.
        quantize: weight -> its tensors by the end of their names, and the weight that they stand for.
    """
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": section}))
    stored, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts, expected[name] = quantize(tensor)
            stored.update({f"{name.removesuffix('weight')}{part}": one for part, one in parts.items()})
        else:
            stored[name] = tensor.bfloat16()
            expected[name] = stored[name].double()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder, expected


def by_library(arguments: dict[str, Any]) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """A weight quantized by compressed-tensors to the nearest number, with a scale a row, or a group of 32 columns."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    kind = "pack-quantized" if args.num_bits == 4 else "float-quantized" if args.type == "float" else "int-quantized"
    top = 448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    size = args.group_size

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        grouped = weight.view(len(weight), -1, size or weight.shape[1])
        low, high = grouped.amin(-1), grouped.amax(-1)
        zeros = torch.zeros(low.shape, dtype=torch.int8)
        scale = (grouped.abs().amax(-1) / top).bfloat16()
        if not args.symmetric:
            scale = ((high - low) / (2**args.num_bits - 1)).bfloat16()
            zeros = ((-(2 ** (args.num_bits - 1)) - low / scale).round().clamp(-8, 7)).to(torch.int8)
        state = {"weight": weight.bfloat16(), "weight_scale": scale, "weight_zero_point": zeros}
        parts = BaseCompressor.get_value_from_registry(kind).compress(state, scheme)
        raw = parts.get("weight")
        if raw is None:
            words = parts["weight_packed"]
            nibbles = torch.stack([(words >> 4 * i) & 15 for i in range(8)], -1).flatten(1)
            raw = nibbles[:, : weight.shape[1]] - 8
        value = (raw.double().view(grouped.shape) - zeros.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)
        if args.type == "float":
            parts["input_scale"] = torch.tensor(0.5)  # of static activations
        return parts, value.view(weight.shape)

    return quantize


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A weight as AutoAWQ's GEMM stores it: transposed, eight columns a word in an order of their own."""
    numbers = torch.randint(16, weight.T.shape)
    zeros = torch.randint(16, (len(numbers) // 32, len(weight)))
    scales = torch.rand(zeros.shape).half() * 0.01

    def packed(nibbles: torch.Tensor) -> torch.Tensor:
        words = nibbles.view(len(nibbles), -1, 8)[:, :, list(AWQ_ORDER)] << torch.arange(0, 32, 4)
        return words.sum(-1).to(torch.uint32).view(torch.int32)

    value = (numbers.view(-1, 32, len(weight)) - zeros.unsqueeze(1)).double() * scales.double().unsqueeze(1)
    parts = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales}
    return parts, value.view(numbers.shape).T


def blocks(weight: torch.Tensor, name: str = "weight_scale_inv") -> tuple[Tensors, torch.Tensor]:
    """A weight in FP8 with a scale, of a given name, for every block of 128 x 128; the last ones are smaller."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.rand(rows, columns) + 0.5
    each = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    raw = (weight / each).to(FP8)
    return {"weight": raw, name: scale}, raw.double() * each.double()


def section_of(arguments: dict[str, Any], format_name: str) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "int8": (section_of(INT8, "int-quantized"), by_library(INT8)),
    "fp8": (section_of(FLOAT, "float-quantized"), by_library(FLOAT)),
    "int4": (section_of(INT4, "pack-quantized"), by_library(INT4)),
    "int4 with zero points": (
        section_of({**INT4, "symmetric": False}, "pack-quantized"),
        by_library({**INT4, "symmetric": False}),
    ),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, blocks),
    "compressed-tensors in blocks": (
        section_of({**FLOAT, "strategy": "block", "block_structure": [128, 128]}, "float-quantized"),
        partial(blocks, name="weight_scale"),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weights_are_those_that_the_numbers_stand_for(dense: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    folder, expected = quantized_copy(dense, tmp_path / "quantized", *KINDS[kind])
    with pytest.raises(InputError, match=f"pgsvd-vllm dequantize {folder} -o DIR"):
        ModelSource(folder)
    made = dequantize(folder, tmp_path / "made")
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        # Rounded once to bf16, or in bf16 by the library's own product.
        torch.testing.assert_close(found[name].double(), value, rtol=2**-7, atol=1e-6)
    assert made.nbytes == sum(tensor.nbytes for tensor in found.values())
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "quantized"]


def test_scales_may_lie_in_another_file(dense: Path, tmp_path: Path) -> None:
    folder, expected = quantized_copy(dense, tmp_path / "quantized", *KINDS["fp8 in blocks"])
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (not name.endswith('proj.weight'))}-of-00002.safetensors" for name in stored}
    for file in set(files.values()):
        save_file({name: stored[name] for name in stored if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "original").mkdir()
    (folder / "original" / "other.bin").write_bytes(b"not copied")
    dequantize(folder, tmp_path / "made")
    assert not (tmp_path / "made" / "original").exists()
    source = ModelSource(tmp_path / "made")
    for name, value in expected.items():
        torch.testing.assert_close(source.weights.tensor(name).double(), value, rtol=2**-7, atol=1e-6)


def test_the_section_may_be_anywhere_and_local_code_is_left_out(dense: Path, tmp_path: Path) -> None:
    section, quantize = KINDS["int8"]
    folder, expected = quantized_copy(dense, tmp_path / "quantized", {**section, "ignore": None}, quantize)
    config = json.loads((folder / "config.json").read_text())
    moved = config.pop("quantization_config")
    config |= {"compression_config": moved, "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    dequantize(folder, tmp_path / "made")
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert not {"compression_config", "quantization_config", "auto_map"} & made.keys()
    source = ModelSource(tmp_path / "made")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(source.weights.tensor(name).double(), expected[name], rtol=2**-7, atol=1e-6)


def test_the_command_makes_what_compress_takes(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    folder, _ = quantized_copy(dense, tmp_path / "quantized", *KINDS["int4"])
    assert main(["dequantize", str(folder), "-o", str(tmp_path / "made")]) == 0
    assert "dense in bfloat16 (was compressed-tensors)" in capsys.readouterr().out
    small: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "dataset": ("python-docs",)}
    result = compress(CompressOptions(str(tmp_path / "made"), tmp_path / "out", ratio=0.3, refine=0, **small))
    assert 0.2 < result.ratios["linear"] < 0.4


@pytest.mark.parametrize(
    ("section", "culprit"),
    [
        *(
            ({"quant_method": "compressed-tensors", **part}, "does not convert")
            for part in ({"transform_config": {"config_groups": {"R1": {}}}}, {"sparsity_config": {"format": "24"}})
        ),
        (None, "has no quantization_config"),
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel.utils.model_dequant.dequantize_model"),
        ({"quant_method": "bitsandbytes"}, r"dequantize\(\) and save_pretrained"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "start from the dense model"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": 3}}}, "cannot be made dense"),
        ("awq", "start from the dense model"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused(dense: Path, tmp_path: Path, section: Any, culprit: str) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    with pytest.raises(InputError, match=culprit):
        dequantize(folder, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_a_missing_scale_is_refused(dense: Path, tmp_path: Path) -> None:
    folder, _ = quantized_copy(dense, tmp_path / "quantized", *KINDS["int8"])
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError, match="up_proj.weight_scale"):
        dequantize(folder, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_an_existing_output_is_left_alone(dense: Path, tmp_path: Path) -> None:
    folder, _ = quantized_copy(dense, tmp_path / "quantized", *KINDS["int8"])
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match="already exists"):
        dequantize(folder, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="`output_dir` .*cannot be written"):
        dequantize(folder, tmp_path / "file" / "made")
