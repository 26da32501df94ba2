"""transformers loads nothing but the files of the index, complete, of the model's shapes, with finite numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME
from pgsvd_vllm.format.writer import write_index
from pgsvd_vllm.hf.quantizer import PgsvdQuantizationConfig

Tensors = dict[str, torch.Tensor]
WEIGHTS = "pgsvd-00001-of-00001.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tiny_compressed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_compressed, tmp_path / "c")


def rewrite(folder: Path, change: Callable[[Tensors], object], promise: bool = False) -> None:
    """Change the tensors of a checkpoint; the index agrees afterwards, and config.json if `promise`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_index(folder, dict.fromkeys(tensors, WEIGHTS), 0)
    if promise:
        edit_section(folder, tensors=len(tensors))


def edit_section(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("where", ["../secret.safetensors", "{tmp}/secret.safetensors", "sub/secret.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, tmp_path: Path, where: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    norm = {NORM: tensors.pop(NORM)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "sub").mkdir()
    for secret in (tmp_path, folder / "sub"):
        save_file(norm, secret / "secret.safetensors", metadata={"format": "pt"})
    edit_index(folder, lambda index: index["weight_map"].update({NORM: where.format(tmp=tmp_path)}))
    refused(folder, rf"{INDEX_NAME}: tensor '{NORM}' points to '.*secret\.safetensors'")


def test_an_index_wholly_elsewhere_is_refused(folder: Path, tiny_compressed: Path) -> None:
    """All files in another folder that holds a good checkpoint."""
    other = shutil.copytree(tiny_compressed, folder.parent / "other")
    edit_index(folder, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], f"../other/{WEIGHTS}")))
    assert (other / INDEX_NAME).exists()
    refused(folder, f"points to '../other/{WEIGHTS}'")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {NORM: None}, {NORM: 3}, {NORM: [WEIGHTS]}])
def test_a_malformed_weight_map_is_refused(folder: Path, weight_map: object) -> None:
    edit_index(folder, lambda index: index.update(weight_map=weight_map))
    refused(folder, INDEX_NAME)


@pytest.mark.parametrize("text", ["[]", "null", "{", "", "[" * 10_000])
def test_an_index_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    refused(folder, f"{INDEX_NAME}: (not valid JSON|expected a JSON object)")


@pytest.mark.parametrize("shape", [(1,), (127,), (128, 1), (1, 128), ()])
def test_a_dense_tensor_of_another_shape_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(shape)}))
    refused(folder, rf"tensor {NORM}: shape \({', '.join(map(str, shape))},?\), LlamaForCausalLM needs \(128,\)")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_a_dense_tensor_of_another_dtype_is_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(128).to(dtype)}))
    refused(folder, f"tensor {NORM}: dtype .*, LlamaForCausalLM needs F32 or F16 or BF16")


@pytest.mark.parametrize("metadata", [None, "x", [1]])
def test_malformed_metadata_of_an_index_is_refused(folder: Path, metadata: object) -> None:
    edit_index(folder, lambda index: index.update(metadata=metadata))
    refused(folder, f"{INDEX_NAME}: metadata is missing or no object")


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({NORM: torch.full((128,), 7.0), "extra": torch.ones(1)}, folder / "pgsvd-2.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update(extra="pgsvd-2.safetensors"))
    refused(folder, f"tensor '{NORM}' is also in")


def test_a_file_with_an_unlisted_tensor_is_refused(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop(NORM))
    refused(folder, f"tensor '{NORM}' is not listed in {INDEX_NAME}")


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_tensors_is_refused(folder: Path, more: int) -> None:
    """Also of tensors that the model would not miss."""
    count = len(open_checkpoint(folder).tensors)
    edit_section(folder, tensors=count + more)
    refused(folder, f"lists {count} tensors, config.json promises {count + more}")


def test_additional_tensors_that_are_promised_load(folder: Path) -> None:
    """Such as those of layers for speculative decoding, which transformers does not run."""
    more = {"model.layers.3.eh_proj.weight": torch.ones(4, 4), "model.layers.3.mlp.up_proj.weight": torch.ones(4, 4)}
    rewrite(folder, lambda tensors: tensors.update(more), promise=True)
    assert AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.shape == (128,)
    check_data(open_checkpoint(folder))


KEYS = ["to_dict", "modules_table", "__class__", "section", "self", "quant_method_", "from_dict", "__dict__", "update"]


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_the_section_are_no_attributes(folder: Path, key: str) -> None:
    edit_section(folder, **{key: "x"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config.quantization_config
    assert type(config) is PgsvdQuantizationConfig
    assert config.to_dict()[key] == "x"
    assert config.modules_table == open_checkpoint(folder).modules


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight_c", NORM, "model.embed_tokens.weight"])
def test_numbers_that_are_not_finite_are_refused(folder: Path, name: str, value: float) -> None:
    rewrite(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(folder, f"tensor {name} holds NaN or infinity in float32")


def test_numbers_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight_c"].view(-1)[:1].fill_(1e5))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    refused(folder, r"up_proj\.weight_c holds NaN or infinity in float16.*too large for float16", dtype=torch.float16)


def test_saving_twice_leaves_the_second_checkpoint_alone(tiny_compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_compressed)
    model.save_pretrained(tmp_path / "d")
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    for size in ("100KB", "300KB", "1GB"):
        model.save_pretrained(tmp_path / "d", max_shard_size=size)
        checkpoint = open_checkpoint(tmp_path / "d")
        assert check_data(checkpoint) is True
        files = {info.file for info in checkpoint.tensors.values()}
        assert set((tmp_path / "d").glob("*.safetensors")) == files
        norms = [tensors[NORM][0].item() for tensors in map(load_file, files) if NORM in tensors]
        assert norms == [2.0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "d").model.norm.weight[0] == 2


def test_saving_beside_other_weights_lists_its_own_alone(tiny_compressed: Path, tmp_path: Path) -> None:
    """Files whose names begin as those of transformers, and the index of a dense model."""
    folder = tmp_path / "d"
    folder.mkdir()
    save_file({NORM: torch.ones(1)}, folder / "model-old.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-old.safetensors"}}')
    AutoModelForCausalLM.from_pretrained(tiny_compressed).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model-old\.safetensors: not part of"):
        open_checkpoint(folder)
    (folder / "model-old.safetensors").unlink()
    assert open_checkpoint(folder).tensors.keys() == open_checkpoint(tiny_compressed).tensors.keys()


def test_a_config_object_of_another_name_loads(folder: Path) -> None:
    """The index is then found by the weight files alone."""
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = "elsewhere"
    assert AutoModelForCausalLM.from_pretrained(folder, config=config).model.norm.weight.shape == (128,)
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, f"tensor {NORM} is missing", config=config)
