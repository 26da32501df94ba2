"""A resumed run is the same one if the bytes of its model and text are, wherever they lie."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.identity import manifest
from pgsvd_vllm.offline.planning.plan import make_plan

SMALL: dict[str, Any] = {"dataset": ("python-docs",), "num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def identity(model: Path, **changes: Any) -> dict[str, str]:
    return manifest(make_plan(CompressOptions(str(model), Path("/nowhere/out"), **{**SMALL, **changes}))).identity


def test_moved_and_touched_weights_are_the_same(model: Path) -> None:
    before = identity(model)
    for path in model.iterdir():
        os.utime(path, (0, 0))
    moved = model.with_name("moved")
    model.rename(moved)
    assert identity(moved) == before


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_another_bit_of_equal_size_and_time_is_noticed(model: Path, place: float) -> None:
    before, weights = identity(model), model / "model.safetensors"
    data, stamp = bytearray(weights.read_bytes()), weights.stat()
    data[int(place * len(data))] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert weights.stat().st_mtime_ns == stamp.st_mtime_ns
    after = identity(model)
    assert {name for name in before if before[name] != after[name]} == {"weights"}


def test_windows_of_another_shape_are_another_text(model: Path, tmp_path: Path) -> None:
    """Even if they hold the same tokens."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 96)
    cut = {"dataset": (str(text),)}
    one = identity(model, **cut, num_calibration_samples=20, max_seq_length=48)
    other = identity(model, **cut, num_calibration_samples=10, max_seq_length=96)
    assert one["calibration text"] != other["calibration text"]


def test_the_seed_of_the_drawn_labels_counts(model: Path) -> None:
    assert identity(model)["seed"] != identity(model, seed=1)["seed"]


def test_a_run_continues_on_a_moved_model(model: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("ranks by"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(CompressOptions(str(model), tmp_path / "out", **SMALL), say=stop)
    moved = tmp_path / "elsewhere"
    model.rename(moved)
    compress(CompressOptions(str(moved), tmp_path / "out", resume=True, **SMALL))
    assert (tmp_path / "out" / "config.json").is_file()


def test_weights_that_cannot_be_read_are_named(model: Path) -> None:
    plan = make_plan(CompressOptions(str(model), Path("/nowhere/out"), **SMALL))
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        manifest(plan)
