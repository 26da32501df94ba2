"""Hub data sets from the hub's cache, without a network."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.hub_rows import hub_rows, is_hub_id
from pgsvd_vllm.offline.data.image_text import has_pairs
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, without a network."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def save_set(cache: Path, name: str, files: dict[str, list[dict[str, Any]]], readme: str = "") -> None:
    """Write a data set of Parquet files as the hub's cache holds it."""
    folder = cache / f"datasets--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    for file, rows in files.items():
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(snapshot / file)
    (snapshot / "README.md").write_text(readme, encoding="utf-8")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION, encoding="ascii")


def places_and_rows(dataset: str) -> list[tuple[str, Any]]:
    return list(hub_rows(dataset, "give another"))


def test_the_training_split_of_a_cached_set_is_read(cache: Path, tiny_model: Path) -> None:
    rows = [{"prompt": str(i), "messages": [{"role": "user", "content": f"Q{i}"}]} for i in range(3)]
    files = {"data/test_sft-00000-of-00001.parquet": rows[:1], "data/train_sft-00000-of-00001.parquet": rows}
    readme = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("test_sft", "train_sft"))
    save_set(cache, "owner/chats", files, f"---\nconfigs:\n- config_name: default\n  data_files:\n{readme}---\n")
    assert places_and_rows("owner/chats") == [(f"row {i}", row) for i, row in enumerate(rows, 1)]
    assert not has_pairs("owner/chats")
    tokenizer = load_tokenizer(tiny_model)
    assert list(read_documents("owner/chats", 1, tokenizer)) == ["Q0", "Q1", "Q2"]
    assert list(read_documents("owner/chats", 0, tokenizer)) == ["Q0"]


def test_a_configuration_is_named_after_a_colon(cache: Path) -> None:
    files = {f"{name}/train-00000.parquet": [{"question": name, "answer": "A"}] for name in ("main", "other")}
    readme = "".join(f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in ("main", "other"))
    save_set(cache, "owner/math", files, f"---\nconfigs:\n{readme}---\n")
    assert places_and_rows("owner/math:other") == [("row 1", {"question": "other", "answer": "A"})]
    with pytest.raises(InputError, match=r"--dataset owner/math: .*main.*other.*; give another"):
        places_and_rows("owner/math")


def test_a_split_is_named_after_a_second_colon(cache: Path) -> None:
    files = {f"data/{name}-00000.parquet": [{"text": name}] for name in ("train", "test")}
    save_set(cache, "owner/split", files)
    assert places_and_rows("owner/split:default:test") == [("row 1", {"text": "test"})]
    assert places_and_rows("owner/split::test") == [("row 1", {"text": "test"})]
    assert places_and_rows("owner/split::train") == places_and_rows("owner/split") == [("row 1", {"text": "train"})]
    with pytest.raises(InputError, match=r"--dataset owner/split::dev: has no split dev; it has .*test"):
        places_and_rows("owner/split::dev")


def test_rows_with_images_are_pairs(cache: Path, tiny_model: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    save_set(cache, "owner/images", {"data/train-00000.parquet": [{"image": image, "caption": "black"}]})
    assert has_pairs("owner/images")
    with pytest.raises(InputError, match=r'--dataset owner/images: row 1: has "image", "caption"; a row needs "text"'):
        list(read_documents("owner/images", 1, load_tokenizer(tiny_model)))


def test_a_short_name_is_read_from_the_cache(cache: Path, tiny_model: Path) -> None:
    files = {f"wikitext-2-raw-v1/{split}-00000.parquet": [{"text": f"{split}\n"}] * 2 for split in ("test", "train")}
    readme = "  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
    readme = f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{readme}---\n"
    save_set(cache, "Salesforce/wikitext", files, readme)
    assert list(read_documents("wikitext2", 100, load_tokenizer(tiny_model))) == ["train\ntrain\n"]


def test_a_set_that_nobody_has_is_named(cache: Path) -> None:
    with pytest.raises(
        InputError, match=r"--dataset nobody/nothing: no such file or folder, and the hub.*; give another"
    ):
        places_and_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", True),
        ("owner/name:main", True),
        ("owner/name:main:test", True),
        ("owner/name::test", True),
        ("data/rows.jsonl", False),
        ("data/text.txt", False),
        ("./owner/name", False),
        ("/name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("name", False),
        ("", False),
    ],
)
def test_hub_ids_are_told_from_paths(name: str, found: bool) -> None:
    assert is_hub_id(name) is found
