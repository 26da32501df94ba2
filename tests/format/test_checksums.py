"""Damage of weight files is found by their checksums, and values that are no numbers in every dtype."""

import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import DTYPE_BITS, check_finite, is_finite
from pgsvd_vllm.format.reader import check_data, check_sums, open_checkpoint, read_headers
from pgsvd_vllm.format.schema import INDEX_NAME
from pgsvd_vllm.format.writer import write_index
from tests.format.test_checkpoint import good_config, good_tensors, write


def edit_metadata(folder: Path, metadata: object) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps(index | {"metadata": metadata}))


def test_the_index_records_the_sum_of_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert len(files) > 1
    assert json.loads((folder / INDEX_NAME).read_text())["metadata"]["sha256"] == files
    assert check_data(open_checkpoint(folder)) is True
    assert check_sums(folder) == len(files)


def test_every_flipped_bit_of_a_weight_file_is_found(tmp_path: Path) -> None:
    """docs/reliability.md has the figure for 500 bits of tensor data; half of these are of the header."""
    folder = write(tmp_path / "c", max_bytes=10**9)
    path = folder / "pgsvd-00001-of-00001.safetensors"
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    bits = [draw.randrange(8 * data) for _ in range(60)]
    bits += [draw.randrange(8 * data, 8 * len(whole)) for _ in range(60)]
    messages = []
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            check_data(open_checkpoint(folder))
        except CheckpointError as error:
            messages.append(str(error))
        with pytest.raises(CheckpointError, match=r"pgsvd-00001-of-00001\.safetensors: damaged"):
            check_sums(folder)
    assert len(messages) == len(bits)
    assert all(str(path) in message for message in messages)


def test_exchanged_files_are_found(tmp_path: Path) -> None:
    """Both are good files, and each has the names and shapes that the other had."""
    first, second = write(tmp_path / "a"), tmp_path / "b"
    write(second, {name: tensor + 1 for name, tensor in good_tensors().items()})
    name = "pgsvd-00001-of-00003.safetensors"
    (first / name).write_bytes((second / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        check_data(open_checkpoint(first))


@pytest.mark.parametrize("metadata", [None, {}, [], "x", {"total_size": 3}])
def test_a_checkpoint_without_sums_stays_valid(
    tmp_path: Path, metadata: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "c")
    edit_metadata(folder, metadata)
    assert check_data(open_checkpoint(folder)) is False
    assert main(["verify", str(folder)]) == 0
    assert "no checksums recorded" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}: records no checksums"):
        check_sums(folder)


@pytest.mark.parametrize("sums", [None, [], "x", {}, {"other": "0" * 64}, {"pgsvd-00001-of-00003.safetensors": 1}])
def test_malformed_sums_are_refused(tmp_path: Path, sums: object) -> None:
    folder = write(tmp_path / "c")
    edit_metadata(folder, {"sha256": sums})
    for check in (lambda: check_data(open_checkpoint(folder)), lambda: check_sums(folder)):
        with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: metadata\.sha256 has no checksum of pgsvd-00001"):
            check()


def test_a_damaged_file_is_named_before_its_values(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", max_bytes=10**9)
    path = folder / "pgsvd-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xff\x7f"  # NaN in bfloat16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, its SHA-256 is"):
        check_data(open_checkpoint(folder))
    edit_metadata(folder, {})
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        check_data(open_checkpoint(folder))


# -- dtypes ---------------------------------------------------------------------------------------

# dtype -> elements in hexadecimal digits, little endian: the largest number, then NaN or infinity; "" if it has none.
VALUES = {
    "F64": ("ffffffffffffef7f", "000000000000f07f"),
    "C64": ("ffff7f7fffff7f7f", "000000000000c07f"),
    "F32": ("ffff7f7f", "0000c0ff"),
    "F16": ("ff7b", "007c"),
    "BF16": ("7f7f", "80ff"),
    "F8_E4M3": ("7e", "ff"),
    "F8_E5M2": ("7b", "fc"),
    "F8_E8M0": ("fe", "ff"),
    "F8_E4M3FNUZ": ("7f", "80"),
    "F8_E5M2FNUZ": ("ff", "80"),
    "I64": ("ff" * 8, ""),
    "BOOL": ("01", ""),
}


def add_raw(folder: Path, dtype: str, data: bytes) -> None:
    """Add a dense tensor `extra` of any dtype in a file of its own."""
    header = {"extra": {"dtype": dtype, "shape": [len(data) * 8 // DTYPE_BITS[dtype]], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    name = "pgsvd-extra.safetensors"
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    write_index(folder, {**weight_map, "extra": name}, 0)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_checked(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = VALUES.get(dtype, ("ff" * 24, ""))
    folder = write(tmp_path / "c")
    add_raw(folder, dtype, bytes.fromhex(good) * 24)
    assert check_data(open_checkpoint(folder))
    assert main(["inspect", str(folder)]) == 0
    assert open_checkpoint(folder).tensors["extra"].nbytes == len(good) // 2 * 24
    capsys.readouterr()
    if bad:
        add_raw(folder, dtype, bytes.fromhex(good) * 23 + bytes.fromhex(bad))
        assert main(["verify", str(folder)]) == 2
        assert "tensor extra holds NaN or infinity" in capsys.readouterr().err


def test_loaded_tensors_of_every_dtype_are_checked() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64):
        tensor = torch.ones(3, 4).to(dtype)
        assert is_finite(tensor)
        assert is_finite(tensor[:0])
        tensor[1, 2] = float("nan")
        assert not is_finite(tensor)
        with pytest.raises(CheckpointError, match="tensor a holds NaN or infinity in"):
            check_finite(tensor.T, "a")
    assert is_finite(torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    assert is_finite(torch.arange(4))


def test_a_dtype_of_the_future_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    monkeypatch.delitem(DTYPE_BITS, "F32")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'a' has the unknown dtype F32"):
        read_headers(tmp_path / "a.safetensors")


# -- files beside the index's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("pgsvd.safetensors", {"model.c.weight": torch.ones(9, 12)}),
        ("model-00001-of-00002.safetensors", {"model.a.weight": torch.ones(7, 10)}),
        ("consolidated.safetensors", {"norm.weight": torch.ones(3)}),
        ("zz.safetensors", {"language_model.c.weight": torch.ones(9, 12)}),
        ("model.safetensors.index.json", None),
    ],
)
def test_files_that_vllm_would_load_as_well_are_refused(
    tmp_path: Path, name: str, tensors: dict[str, torch.Tensor] | None
) -> None:
    folder = write(tmp_path / "c")
    if tensors is None:
        (folder / name).write_text("{}")
    else:
        save_file(tensors, folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: not part of {INDEX_NAME}.* delete or move it"):
        open_checkpoint(folder)


def test_other_files_beside_the_weights_are_no_concern(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / "adapter").mkdir()
    save_file({"model.c.weight": torch.ones(1)}, folder / "adapter" / "model.safetensors")
    for name in ("pytorch_model.bin", ".hidden.safetensors", "notes.safetensors.txt"):
        (folder / name).write_bytes(b"")
    open_checkpoint(folder)


@pytest.mark.parametrize("name", ["weights.bin", ".pgsvd.safetensors", "pgsvd.safetensors.old"])
def test_files_that_vllm_would_not_load_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c", max_bytes=10**9)
    (folder / "pgsvd-00001-of-00001.safetensors").rename(folder / name)
    write_index(folder, dict.fromkeys(good_tensors(), name), 0)
    assert load_file(folder / name)
    with pytest.raises(CheckpointError, match=f"points to '{name}', not to a safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("promised", [5, 7, True, 6.0, "6", None, [6], float("nan")])
def test_a_wrong_number_of_tensors_is_refused(tmp_path: Path, promised: object) -> None:
    config = good_config()
    config["quantization_config"]["tensors"] = promised
    with pytest.raises(CheckpointError, match="lists 6 tensors, config.json promises"):
        open_checkpoint(write(tmp_path / "c", config=config))


@pytest.mark.parametrize("head", ["model.c", "model.p", "", 0, False, ["model.a"], {"model.a": 1}])
def test_a_head_that_is_no_factored_module_is_refused(tmp_path: Path, head: object) -> None:
    config = good_config()
    config["quantization_config"]["modules"]["model.p"] = {"rank": 1, "form": "pivot"}
    config["quantization_config"]["head"] = head
    with pytest.raises(CheckpointError, match=r"config\.json: head is"):
        open_checkpoint(write(tmp_path / "c", config=config))
