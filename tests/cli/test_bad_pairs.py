"""Invalid image-text pairs, and models that cannot use pairs."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.refusal import Refusal
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(VISION_MODELS[0], tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = next(row for row in VISION_MODELS if row.name.startswith("LLaVA"))
    return save_vision_model(row, tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return save_pairs(tmp_path / "pairs", 4)


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("7", 'no "image"'),
        ('{"image": "0.png"}', 'no "text"'),
        ('{"image": 3, "text": "a"}', 'no "image"'),
        ('{"image": "missing.png", "text": "a"}', "missing.png is no file"),
        ('{"image": "../0.png", "text": "a"}', "0.png is no file in that folder"),
        ('{"image": "/etc/hostname", "text": "a"}', "hostname is no file in that folder"),
        ('{"image": "drawing.eps", "text": "a"}', "drawing.eps is no image"),
        ('{"image": "captions.jsonl", "text": "a"}', "captions.jsonl is no image"),
        ('{"image": "cut.png", "text": "a"}', "cut.png is no image"),
        ("", "no pairs"),
    ],
)
def test_malformed_caption_rows_are_refused(refused: Refusal, clip: Path, pairs: Path, line: str, culprit: str) -> None:
    (pairs / "cut.png").write_bytes((pairs / "0.png").read_bytes()[:200])
    shutil.copyfile(pairs / "0.png", pairs.parent / "0.png")
    (pairs / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoding="ascii")
    (pairs / "captions.jsonl").write_text(line + "\n", encoding="utf-8")
    refused(clip, "--dataset", pairs, culprits=(str(pairs), culprit))


def test_a_folder_without_captions_is_refused(refused: Refusal, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(clip, "--dataset", tmp_path / "empty", culprits=(str(tmp_path / "empty"), "captions.jsonl"))


def test_an_unavailable_hub_dataset_is_refused(refused: Refusal, clip: Path) -> None:
    refused(clip, "--dataset", "nobody/nothing", culprits=("--dataset nobody/nothing", "captions.jsonl"))


def test_pairs_are_refused_for_a_language_model(refused: Refusal, tiny_model: Path, pairs: Path) -> None:
    refused(tiny_model, "--dataset", pairs, culprits=(str(pairs), "reads no images"))


def test_text_alone_is_refused_for_a_dual_encoder(refused: Refusal, clip: Path) -> None:
    refused(clip, culprits=("--dataset python-docs", "compares images with texts"))


def test_too_few_pairs_are_refused(refused: Refusal, llava: Path, clip: Path, pairs: Path) -> None:
    refused(llava, "--dataset", pairs, culprits=(str(pairs), "too little calibration text"))
    (pairs / "captions.jsonl").write_text('{"image": "0.png", "text": "a"}\n', encoding="utf-8")
    refused(clip, "--dataset", pairs, culprits=(str(pairs), "too little"))


@pytest.mark.parametrize("option", ["--ratio", "--tolerance"])
def test_unknown_towers_are_refused(refused: Refusal, llava: Path, tmp_path: Path, option: str) -> None:
    many = save_pairs(tmp_path / "pairs", 16)
    refused(llava, "--dataset", many, option, "audio=0.2", culprits=(option, "audio", "vision, projector, language"))
    refused(llava, option, "vision=0.2", culprits=(option, "vision", "language"))  # text alone
    refused(llava, "--dataset", many, option, "vision=0.2,language=2", culprits=(option, "between 0 and 1"))


def test_ignoring_every_projection_is_refused(refused: Refusal, llava: Path) -> None:
    refused(llava, "--ignore", "language_model.*", culprits=("nothing is left", "images"))


def test_distilling_a_vision_language_model_is_refused(refused: Refusal, llava: Path, pairs: Path) -> None:
    refused(llava, "--dataset", pairs, "--refine", "1", culprits=("--refine",))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"image_processor_type": "NoSuchProcessor"})])
def test_a_missing_image_processor_is_refused(
    refused: Refusal,
    llava: Path,
    pairs: Path,
    tmp_path: Path,
    content: str | None,
) -> None:
    model = shutil.copytree(llava, tmp_path / "model")
    for path in model.glob("*processor*.json"):
        path.unlink()
    if content is not None:
        (model / "preprocessor_config.json").write_text(content, encoding="utf-8")
    refused(model, "--dataset", pairs, culprits=(str(model), "processor"))
