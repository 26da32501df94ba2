"""What vLLM loads is the checkpoint that its index and config.json describe, from a folder or a hub cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.format.schema import INDEX_NAME
from tests.conftest import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")

Tensors = dict[str, torch.Tensor]
WEIGHTS = "pgsvd-00001-of-00001.safetensors"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj"
STRAY = "zz.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint; file, index and checksum agree afterwards, as after a damaged upload."""
    from pgsvd_vllm.format.writer import write_index

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_index(folder, dict.fromkeys(tensors, WEIGHTS), 0)


def set_factor(value: float) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors[f"{UP}.weight_c"].view(-1)[:1].fill_(value))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def unchanged(folder: Path) -> None:
    """The checkpoint as it was written."""


def add_stray(folder: Path) -> None:
    save_file({NORM: torch.full((128,), 7.0)}, folder / STRAY, metadata={"format": "pt"})


def remove_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][NORM] = f"../{WEIGHTS}"
    (folder / INDEX_NAME).write_text(json.dumps(index))


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the last digit of the first number
    (folder / WEIGHTS).write_bytes(content)


def forget_sums(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["metadata"]["sha256"]
    (folder / INDEX_NAME).write_text(json.dumps(index))


LOADED = "loaded, norm 1.0"
CHECK = {"verify_checksums": True}
# What is done to the checkpoint; where vLLM finds it; the load format; the loader's options or the dtype; the outcome.
CASES: list[tuple[Callable[[Path], None], str, str, dict[str, Any], str]] = [
    (unchanged, "hub", "auto", {}, LOADED),
    (without("model.embed_tokens.weight"), "hub", "auto", {}, "config.json promises"),
    (without(f"{UP}.weight_c"), "hub", "auto", {}, f"{UP}.weight_c is missing"),
    (add_stray, "hub", "auto", {}, f"{STRAY}: tensor '{NORM}' is also in {WEIGHTS}"),
    (add_stray, "hub", "pgsvd", {}, LOADED),
    (add_stray, "folder", "auto", {}, f"{STRAY}: not part of {INDEX_NAME}"),
    (remove_index, "hub", "auto", {}, LOADED),
    (remove_index, "hub", "pgsvd", {}, LOADED),
    (remove_index, "folder", "auto", {}, LOADED),
    (point_outside, "hub", "pgsvd", {}, f"tensor '{NORM}' points to '../{WEIGHTS}'"),
    (set_factor(float("nan")), "hub", "auto", {}, f"tensor {UP}.weight_c holds NaN or infinity in float32"),
    (set_factor(float("inf")), "folder", "pgsvd", {}, f"tensor {UP}.weight_c holds NaN or infinity in float32"),
    (set_factor(1e5), "folder", "pgsvd", {"dtype": "float16"}, f"{UP}.weight_c holds NaN or infinity in float16"),
    (flip_a_bit, "folder", "pgsvd", {}, LOADED),
    (flip_a_bit, "folder", "pgsvd", {"extra": CHECK}, f"{WEIGHTS}: damaged, its SHA-256 is"),
    (unchanged, "folder", "pgsvd", {"extra": CHECK}, LOADED),
    (forget_sums, "folder", "pgsvd", {"extra": CHECK}, f"{INDEX_NAME}: records no checksums"),
    (unchanged, "folder", "pgsvd", {"extra": {"verify_checksums": "yes"}}, "verify_checksums is 'yes', not true or"),
    (unchanged, "folder", "pgsvd", {"extra": {"no_such_option": 1}}, "Unexpected extra config keys"),
]
NUMBERS = range(len(CASES))


@pytest.fixture(scope="module")
def outcomes(tiny_compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What vLLM said of every case: all of them in one process, which finds hub ids in a cache without a network."""
    root = tmp_path_factory.mktemp("loads")
    lines = []
    for number, (change, place, load_format, options, _) in enumerate(CASES):
        repository = root / "hub" / f"models--org--case{number}"
        folder = shutil.copytree(tiny_compressed, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        change(folder)
        model = f"org/case{number}" if place == "hub" else str(folder)
        lines.append(
            json.dumps({"model": model, "load_format": load_format, "dtype": "float32", "extra": {}} | options)
        )
    done = subprocess.run(
        [sys.executable, "tests/serving/load_each.py"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    said = [line.removeprefix("OUTCOME ") for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    assert len(said) == len(CASES), done.stdout[-2000:] + done.stderr[-3000:]
    return said


@pytest.mark.parametrize("number", NUMBERS)
def test_vllm_loads_the_checkpoint_or_names_the_fault(number: int, outcomes: list[str]) -> None:
    assert CASES[number][-1] in outcomes[number], CASES[number]
