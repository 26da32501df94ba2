"""Damaged, exchanged and replaced work files never reach a checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.collect import Calibration
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48}


def flip(path: Path) -> None:
    """Change one bit of the data."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


def zero(path: Path) -> None:
    """Lose the second half, as a file does that was renamed before it was on the disk."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def exchange(path: Path) -> None:
    """Exchange the file with that of another layer."""
    other = path.with_name(path.name.replace("00001", "00002"))
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def rewrite(path: Path) -> None:
    """Store the same tensors without checksums, and other values beside them."""
    save_file(load_file(path), path, metadata={"layer": "{}", "reports": "[]", "content": "{}"})


@pytest.fixture(scope="module")
def factored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """DIR.partial of a run that was interrupted while it wrote the checkpoint, and the weights of a whole run."""
    folder = tmp_path_factory.mktemp("factored")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test
    compress(CompressOptions(str(tiny_model), folder / "whole", ratio=0.3, **SMALL))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgsvd_vllm.offline.compress.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
            compress(CompressOptions(str(tiny_model), folder / "out", ratio=0.3, **SMALL))
    # Three layers, factored and distilled.
    assert len(list(folder.glob("out.partial/factors-*/*.safetensors"))) == 6
    torch.set_num_threads(threads)
    return folder / "out.partial", weights_of(folder / "whole")


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("layers/00001.safetensors", flip),
        ("layers/00001.safetensors", rewrite),
        ("layers/00001.measured.safetensors", zero),
        ("layers/00001.measured.safetensors", exchange),
        ("factors-????????????????/00001.safetensors", flip),
        ("factors-????????????????/00001.safetensors", rewrite),
        ("factors-????????????????/00001.safetensors", lambda path: os.truncate(path, 0)),
        ("factors-*-*/00001.safetensors", flip),
        ("factors-*-*/00001.safetensors", rewrite),
    ],
)
def test_a_damaged_work_file_is_computed_again(
    factored: tuple[Path, dict[str, bytes]],
    tiny_model: Path,
    tmp_path: Path,
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    partial, whole = factored
    shutil.copytree(partial, tmp_path / "out.partial")
    path = next(tmp_path.glob(f"out.partial/{pattern}"))
    damage(path)
    said: list[str] = []
    compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, resume=True, **SMALL), said.append)
    warnings = [line for line in said if line.startswith("WARNING")]
    assert warnings
    assert all("damaged" in line and "computed again" in line for line in warnings)
    assert str(path) in warnings[0]
    assert weights_of(tmp_path / "out") == whole


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_than_a_work_file_is_refused(
    factored: tuple[Path, dict[str, bytes]], tiny_model: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    shutil.copytree(factored[0], tmp_path / "out.partial")
    path = tmp_path / "out.partial" / "layers" / "00001.safetensors"
    path.unlink()
    make(path)
    with pytest.raises(InputError, match=r"00001\.safetensors: .*remove it and repeat with --resume"):
        compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, resume=True, **SMALL))
    assert path.exists()
    assert (tmp_path / "out.partial" / "layers" / "00002.safetensors").is_file()


def test_a_file_damaged_during_the_run_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    def damage(line: str) -> None:
        if line.startswith("ranks by"):
            flip(tmp_path / "out.partial" / "layers" / "00001.safetensors")

    options = CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, **SMALL)
    with pytest.raises(InputError, match=r"00001\.safetensors: damaged .*--resume, which computes it again"):
        compress(options, damage)
    assert not options.output.exists()
    assert (tmp_path / "out.partial" / "layers" / "00002.safetensors").is_file()


def test_a_file_of_another_run_is_not_used(
    factored: tuple[Path, dict[str, bytes]], tiny_model: Path, tmp_path: Path
) -> None:
    """Its checksums are right, but it holds the calibration of another text."""
    partial, whole = factored
    compress(CompressOptions(str(tiny_model), tmp_path / "o", calibration=tmp_path / "other", seed=1, **SMALL))
    shutil.copytree(partial, tmp_path / "out.partial")
    name = "layers/00001.safetensors"
    shutil.copyfile(tmp_path / "other" / "00001.safetensors", tmp_path / "out.partial" / name)
    said: list[str] = []
    compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, resume=True, **SMALL), said.append)
    assert any(name in line and "another run" in line for line in said)
    assert weights_of(tmp_path / "out") == whole


def test_factors_of_another_version_are_computed_again(
    factored: tuple[Path, dict[str, bytes]], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, whole = factored
    shutil.copytree(partial, tmp_path / "out.partial")
    before = {path.name for path in tmp_path.glob("out.partial/factors-*")}
    monkeypatch.setattr("pgsvd_vllm.__version__", "0.0.1")
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        if line.startswith("ranks by"):
            monkeypatch.setattr("pgsvd_vllm.offline.compress.write_checkpoint", stop)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, resume=True, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        compress(options, note)
    assert not before & {path.name for path in tmp_path.glob("out.partial/factors-*")}
    changed = [line for line in said if "begun with pgsvd-vllm" in line]
    assert len(changed) == 1
    assert "now 0.0.1" in changed[0]
    monkeypatch.undo()
    compress(options)
    assert weights_of(tmp_path / "out") == whole


def test_damage_while_measuring_keeps_the_other_layers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the first run, which otherwise deletes what an error makes useless."""
    backward = Calibration._backward

    def damaged(self: Calibration, *arguments: Any) -> None:
        flip(tmp_path / "out.partial" / "layers" / "00001.safetensors")
        backward(self, *arguments)

    monkeypatch.setattr(Calibration, "_backward", damaged)
    with pytest.raises(InputError, match=r"00001\.safetensors: damaged"):
        compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, **SMALL))
    assert (tmp_path / "out.partial" / "layers" / "00000.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error", "x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_what_the_system_refuses_keeps_finished_layers(tiny_model: Path, tmp_path: Path, error: Exception) -> None:
    def fail(line: str) -> None:
        if line.startswith("ranks by"):
            raise error

    with pytest.raises(InputError, match="finished layers are kept in .*out.partial, continue with --resume"):
        compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, **SMALL), fail)
    assert (tmp_path / "out.partial" / "layers" / "00002.safetensors").is_file()
