"""Damaged and hostile checkpoints are refused with an error that names the fault, before any tensor is loaded."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import check_data, open_checkpoint, read_config, read_headers
from pgsvd_vllm.format.schema import INDEX_NAME, parse_modules
from pgsvd_vllm.format.writer import TensorWriter

Tensors = dict[str, torch.Tensor]


def good_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return {
        "model.a.weight_v": random(3, 10),
        "model.a.weight_u": random(7, 3),
        "model.a.bias": random(7),
        "model.b.weight_v": random(5, 7),
        "model.b.weight_u": random(12, 5),
        "model.c.weight": random(9, 12),
    }


def good_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "pgsvd",
            "version": 1,
            "modules": {"model.a": {"rank": 3, "form": "factors"}, "model.b": {"rank": 5, "form": "factors"}},
            "tool_version": "0.1.0",
        },
    }


def write(folder: Path, tensors: Tensors | None = None, config: object = None, max_bytes: int = 200) -> Path:
    folder.mkdir(exist_ok=True)
    writer = TensorWriter(folder, max_bytes)
    for name, tensor in (tensors or good_tensors()).items():
        writer.add(name, tensor)
    writer.close()
    (folder / "config.json").write_text(json.dumps(good_config() if config is None else config), encoding="utf-8")
    return folder


def refused(folder: Path, *culprits: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    for culprit in culprits:
        assert culprit in message
    return message


def test_a_valid_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path / "c")))
    assert {name: row.rank for name, row in checkpoint.modules.items()} == {"model.a": 3, "model.b": 5}
    assert checkpoint.shape("model.a") == (7, 10, 3)
    assert checkpoint.shape("model.b") == (12, 7, 5)
    assert set(checkpoint.tensors) == set(good_tensors())
    for name, tensor in good_tensors().items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), "BF16")
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.numel() * 2)
    check_data(checkpoint)


@pytest.mark.parametrize("max_bytes", [1, 50, 100, 250, 10**9])
def test_shards_read_back_equal(tmp_path: Path, max_bytes: int) -> None:
    folder = write(tmp_path / "c", max_bytes=max_bytes)
    files = sorted(folder.glob("*.safetensors"))
    if max_bytes == 1:
        assert len(files) == len(good_tensors()), "a tensor larger than the bound has a file of its own"
    elif max_bytes == 10**9:
        assert len(files) == 1
    else:
        assert len(files) > 1
    count = len(files)
    assert [f.name for f in files] == [f"pgsvd-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    read: Tensors = {}
    for file in files:
        part = load_file(file)
        size = sum(t.numel() * t.element_size() for t in part.values())
        assert size <= max_bytes or len(part) == 1
        read.update(part)
    assert set(read) == set(good_tensors())
    for name, tensor in good_tensors().items():
        assert torch.equal(read[name], tensor)
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in good_tensors().values())
    for name, file_name in index["weight_map"].items():
        assert name in load_file(folder / file_name)
    open_checkpoint(folder)


def test_the_writer_accepts_views(tmp_path: Path) -> None:
    whole = torch.arange(40.0).view(5, 8)
    writer = TensorWriter(tmp_path)
    writer.add("columns", whole[:, 1:4])
    writer.add("transposed", whole.T)
    assert writer.close() == (15 + 40) * 4
    read = load_file(tmp_path / "pgsvd-00001-of-00001.safetensors")
    assert torch.equal(read["columns"], whole[:, 1:4])
    assert torch.equal(read["transposed"], whole.T)


# -- files ---------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", max_bytes=10**9)
    file = folder / "pgsvd-00001-of-00001.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for cut in sorted(cuts):
        file.write_bytes(whole[:cut])
        refused(folder, str(file))
        with pytest.raises(CheckpointError, match="pgsvd-00001-of-00001"):
            read_headers(file)
    file.write_bytes(whole + b"\0")
    refused(folder, str(file))


@pytest.mark.parametrize(
    "content",
    [
        b"not a safetensors file at all",
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
def test_a_garbage_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "c")
    file = folder / "pgsvd-00002-of-00003.safetensors"
    assert file.exists()
    file.write_bytes(content)
    refused(folder, str(file))


def test_a_header_with_wrong_offsets_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", max_bytes=10**9)
    file = folder / "pgsvd-00001-of-00001.safetensors"
    whole = file.read_bytes()
    for old, new in ((b"[3,10]", b"[3,11]"), (b'"BF16"', b'"F32"_'), (b'"BF16"', b'"F999"'), (b"[0,", b"[9,")):
        assert old in whole
        file.write_bytes(whole.replace(old, new, 1))
        refused(folder, str(file))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    file = folder / "pgsvd-00002-of-00003.safetensors"
    file.unlink()
    refused(folder, str(file), "no such file")
    file.mkdir()
    refused(folder, str(file), "no such file")


def test_a_missing_folder_config_or_index_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", str(tmp_path / "absent"))
    refused(tmp_path / ("x" * 300), "no such folder")
    folder = write(tmp_path / "c")
    (folder / INDEX_NAME).unlink()
    refused(folder, INDEX_NAME)
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    (folder / "config.json").mkdir()
    refused(folder, "config.json")


# -- the index -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/pgsvd.safetensors",
        "..",
        ".",
        "",
        7,
        None,
        ["x"],
        "nul\0.safetensors",
        "x" * 300,
        "\ud800.safetensors",
    ],
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: object) -> None:
    # The target of the path traversal exists and is valid, so only the check can refuse it.
    save_file({"model.c.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    folder = write(tmp_path / "c")
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"]["model.c.weight"] = name
    path.write_text(json.dumps(index))
    message = refused(folder, str(folder))
    assert "no such file" in message or "model.c.weight" in message
    assert "\n" not in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    folder = write(tmp_path / "c")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, INDEX_NAME, "weight_map")


def test_an_index_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    path = folder / INDEX_NAME
    good = path.read_text()

    def edited(change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads(good)
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    edited(lambda m: m.update({"model.ghost": "pgsvd-00001-of-00003.safetensors"}))
    refused(folder, "model.ghost", "missing")
    edited(lambda m: m.pop("model.a.bias"))
    refused(folder, "model.a.bias", "not listed")
    edited(lambda m: m.update({"model.a.weight_v": "pgsvd-00003-of-00003.safetensors"}))
    refused(folder, "model.a.weight_v")
    # The same tensor in two files.
    path.write_text(good)
    third = folder / "pgsvd-00003-of-00003.safetensors"
    save_file({**load_file(third), "model.a.bias": torch.zeros(7)}, third)
    refused(folder, "model.a.bias")


# -- tensors against the table --------------------------------------------------------------------


def changed(**change: torch.Tensor | None) -> Tensors:
    tensors: dict[str, torch.Tensor | None] = {**good_tensors()}
    for name, tensor in change.items():
        tensors["model." + name.replace("__", ".")] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "culprit"),
    [
        (changed(a__weight_v=None), "model.a.weight_v"),
        (changed(b__weight_u=None), "model.b.weight_u"),
        (changed(a__weight_u=None, a__weight_v=None), "model.a.weight_v"),
        (changed(d__weight_u=torch.ones(2, 2)), "model.d.weight_u"),
        (changed(c__weight_v=torch.ones(2, 12), c__weight_u=torch.ones(9, 2)), "model.c.weight_"),
        (changed(a__weight=torch.ones(7, 10)), "model.a.weight"),
        (changed(a__weight_v=torch.ones(4, 10).bfloat16()), "model.a"),
        (changed(a__weight_u=torch.ones(3, 7).bfloat16()), "model.a"),
        (changed(a__weight_v=torch.ones(4, 10).bfloat16(), a__weight_u=torch.ones(7, 4).bfloat16()), "rank 3"),
        (changed(a__weight_v=torch.ones(30).bfloat16()), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 10, 1).bfloat16()), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 0).bfloat16()), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(()).bfloat16()), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 10, dtype=torch.int8)), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 10, dtype=torch.bool)), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 10, dtype=torch.float64)), "model.a.weight_v"),
        (changed(a__weight_v=torch.ones(3, 10, dtype=torch.float16)), "model.a"),
    ],
)
def test_tensors_that_contradict_the_table_are_refused(tmp_path: Path, tensors: Tensors, culprit: str) -> None:
    refused(write(tmp_path / "c", tensors), culprit)


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 4, 10**30, 2**63, True, False, None, "3", 3.0, [3], {}])
def test_a_wrong_rank_is_refused(tmp_path: Path, rank: object) -> None:
    config = good_config()
    config["quantization_config"]["modules"]["model.a"]["rank"] = rank
    refused(write(tmp_path / "c", config=config), "model.a", "rank")


def test_a_rank_of_another_json_type_is_refused(tmp_path: Path) -> None:
    tensors = changed(a__weight_v=torch.ones(1, 10), a__weight_u=torch.ones(7, 1))
    config = good_config()
    row = config["quantization_config"]["modules"]["model.a"]
    row["rank"] = 1
    open_checkpoint(write(tmp_path / "good", tensors, config))
    for rank in (True, 1.0):
        row["rank"] = rank
        refused(write(tmp_path / str(rank), tensors, config), "model.a", repr(rank))


@pytest.mark.parametrize("form", [None, "dense", "FACTORS", ["factors"], {"factors": 1}, 0])
def test_an_unknown_form_is_refused(tmp_path: Path, form: object) -> None:
    config = good_config()
    config["quantization_config"]["modules"]["model.b"]["form"] = form
    refused(write(tmp_path / "c", config=config), "model.b", "form", "config.json")


@pytest.mark.parametrize("version", [3, 0, -1, None, "1", [], True, 1.5])
def test_an_unknown_version_names_the_version_to_install(tmp_path: Path, version: object) -> None:
    config = good_config()
    config["quantization_config"].update(version=version, tool_version="7.8.9")
    message = refused(write(tmp_path / "c", config=config), "config.json", "7.8.9", repr(version))
    assert "versions 1 and 2" in message
    del config["quantization_config"]["tool_version"]
    refused(write(tmp_path / "d", config=config), "unknown")


@pytest.mark.parametrize("table", [None, [], "model.a", 5, {"model.a": None}, {"model.a": 3}, {"model.a": []}])
def test_a_malformed_module_table_is_refused(tmp_path: Path, table: object) -> None:
    config = good_config()
    config["quantization_config"]["modules"] = table
    refused(write(tmp_path / "c", config=config), "config.json")


@pytest.mark.parametrize("section", [None, [], "pgsvd", 1, {}, {"quant_method": "gptq"}, {"quant_method": ["pgsvd"]}])
def test_another_quantization_method_is_refused(tmp_path: Path, section: object) -> None:
    config = good_config()
    config["quantization_config"] = section
    refused(write(tmp_path / "c", config=config), "not a pgsvd checkpoint", "pgsvd-vllm compress")
    if isinstance(section, dict):
        with pytest.raises(CheckpointError, match="here: quantization method"):
            parse_modules(section, "here")


def test_a_table_that_lists_a_dense_module_is_refused(tmp_path: Path) -> None:
    config = good_config()
    config["quantization_config"]["modules"]["model.c"] = {"rank": 2, "form": "factors"}
    refused(write(tmp_path / "c", config=config), "model.c.weight")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", '"x"', "{", "{'a': 1}", "[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_json_that_is_not_an_object_is_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path / "c")
    (folder / name).write_text(text)
    message = refused(folder, str(folder / name))
    assert len(message) < 500


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "it is a pipe or a device" in refused(folder, str(folder / name))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x80", b"{\x00}"])
def test_json_that_is_not_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "c")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(folder)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.a.weight_u", "model.c.weight", "model.a.bias"])
def test_one_value_that_is_not_finite_is_found(tmp_path: Path, name: str, value: float) -> None:
    tensors = good_tensors()
    tensors[name].view(-1)[-1] = value
    checkpoint = open_checkpoint(write(tmp_path / "c", tensors))
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)} holds NaN or infinity"):
        check_data(checkpoint)


def test_integer_tensors_pass_the_finite_check(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {**good_tensors(), "model.table": torch.arange(5)})
    check_data(open_checkpoint(folder))


def test_fewer_tensors_than_config_json_states_are_refused(tmp_path: Path, tiny_compressed: Path) -> None:
    """If a dense tensor is missing from file and index alike, only the count in config.json reveals it."""
    folder = shutil.copytree(tiny_compressed, tmp_path / "copy")
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"lists {len(tensors)} tensors, .* promises {len(tensors) + 1}"):
        open_checkpoint(folder)


def pivot_checkpoint(folder: Path, **change: torch.Tensor | None) -> Path:
    """One module of shape [7, 11], rank 3, in pivot form."""
    tensors = {
        "weight_p": torch.randn(3, 11),
        "weight_c": torch.randn(4, 3),
        "pivots": torch.tensor([0, 2, 6], dtype=torch.int32),
    }
    config = good_config()
    config["quantization_config"]["modules"] = {"model.a": {"rank": 3, "form": "pivot"}}
    chosen = {f"model.a.{name}": t for name, t in {**tensors, **change}.items() if t is not None}
    return write(folder, chosen, config)


def test_a_pivot_form_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pivot_checkpoint(tmp_path / "c"))
    assert checkpoint.shape("model.a") == (7, 11, 3)
    check_data(checkpoint)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"pivots": None}, "model.a.pivots is missing"),
        ({"weight_c": None}, "model.a.weight_c is missing"),
        ({"weight_c": torch.randn(4, 2)}, "the table says rank 3"),
        ({"weight_p": torch.randn(2, 11)}, "the table says rank 3"),
        ({"pivots": torch.tensor([0, 2], dtype=torch.int32)}, "the table says rank 3"),
        ({"pivots": torch.tensor([0, 2, 6])}, "model.a.pivots has dtype I64, not I32"),
        ({"pivots": torch.tensor([[0, 2, 6]], dtype=torch.int32)}, "not 1 dimension"),
        ({"weight_c": torch.randn(4, 3).bfloat16()}, "weight_p in F32 and weight_c in BF16"),
        ({"weight_u": torch.randn(7, 3)}, "model.a.weight_u belongs to no module"),
        ({"weight": torch.randn(7, 11)}, "both model.a.weight and the factors of model.a"),
    ],
)
def test_pivot_tensors_that_contradict_the_table_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], culprit: str
) -> None:
    refused(pivot_checkpoint(tmp_path / "c", **change), "model.a", culprit)


@pytest.mark.parametrize("rows", [[0, 2, 7], [-1, 2, 6], [2, 2, 6], [6, 2, 0]])
def test_pivots_that_are_not_row_numbers_are_refused(tmp_path: Path, rows: list[int]) -> None:
    checkpoint = open_checkpoint(pivot_checkpoint(tmp_path / "c", pivots=torch.tensor(rows, dtype=torch.int32)))
    with pytest.raises(CheckpointError, match=r"\S+: tensor model\.a\.pivots: not ascending row numbers from 0 to 6"):
        check_data(checkpoint)
