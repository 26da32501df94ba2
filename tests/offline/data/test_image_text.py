"""Images with texts: image files of every kind, and rows that are no pairs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.image_text import Pairs, has_pairs, load_processor, read_pairs
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model

CLIP, LLAVA = "CLIP", "LLaVA 1.5"


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    rows = {row.name: row for row in VISION_MODELS}
    return {name: load_processor(save_vision_model(rows[name], folder / name)) for name in (CLIP, LLAVA)}


def write_rows(folder: Path, *rows: Any, name: str = "captions.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def grey(level: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32, 3), level, np.uint8))


def read(folder: Path, processors: dict[str, Any], model: str = CLIP) -> Pairs:
    return read_pairs(str(folder), 8, 0, processors[model], 16 if model == CLIP else None)


def pixels(folder: Path, processors: dict[str, Any]) -> torch.Tensor:
    return read(folder, processors).batches[0]["pixel_values"]


def test_every_image_mode_gives_the_same_pixels(tmp_path: Path, processors: dict[str, Any]) -> None:
    level = 0x66  # a level of the web palette
    write_rows(tmp_path, {"image": "a.png", "text": "grey"})
    grey(level).save(tmp_path / "a.png")
    wanted = pixels(tmp_path, processors)
    animated = tmp_path / "a.gif"
    sixteen_bits = Image.fromarray(np.full((32, 32), level * 257, np.uint16))
    grey(level).save(animated, save_all=True, append_images=[grey(0)])
    images = [grey(level).convert(mode) for mode in ("L", "RGBA", "LA", "P", "CMYK")]
    for image in [*images, sixteen_bits]:
        path = tmp_path / ("a.tiff" if image.mode == "CMYK" else "a.png")
        image.save(path)
        write_rows(tmp_path, {"image": path.name, "text": "grey"})
        assert torch.allclose(pixels(tmp_path, processors), wanted, atol=0.02), image.mode
    write_rows(tmp_path, {"image": animated.name, "text": "grey"})
    assert torch.allclose(pixels(tmp_path, processors), wanted, atol=0.02)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "good.png", "text": " \n"}, "has an empty text"),
        ({"image": "good.png", "text": ["a", "b"]}, 'has no "image" or no "text", only image, text'),
        ({"image": "good.png", "conversations": []}, 'no "text", only image, conversations'),
        ({"image": ["good.png"], "text": "a"}, 'no "image"'),
        ({"image": None, "text": "a"}, 'no "image"'),
        ({"image": "a\0b.png", "text": "a"}, "is no file in that folder"),
        ({"image": "a\nb.png", "text": "a"}, "is no file in that folder"),
        ({"image": "\ud800.png", "text": "a"}, "is no file in that folder"),
        ({"image": "x" * 5000, "text": "a"}, "is no file in that folder"),
        ({"image": "", "text": "a"}, "is no file in that folder"),
        ({"image": "link.png", "text": "a"}, "is no file in that folder"),
        ({"image": "up/../../outside.png", "text": "a"}, "is no file in that folder"),
        ({"image": "cut.jpg", "text": "a"}, "is no image that can be read (image file is truncated"),
        ({"image": "bomb.png", "text": "a"}, "is no image that can be read (Image size (100000000 pixels"),
        ({"image": "float.tiff", "text": "a"}, "is no image that can be read (32 bits a channel"),
        ({"image": "empty.png", "text": "a"}, "is no image that can be read"),
        ({"image": "error.png", "text": "a"}, "is no image that can be read"),
        ("good.png", "only good.png"),
        (7, "only 7"),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path: Path, processors: dict[str, Any], row: Any, reason: str) -> None:
    folder = tmp_path / "pairs"
    write_rows(folder, row)
    (folder / "up").mkdir()
    for path in (folder / "good.png", tmp_path / "outside.png"):
        grey(9).save(path)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    if "bomb" in str(row):
        Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tiff")
    (folder / "empty.png").touch()
    (folder / "error.png").write_text("<html>404</html>", encoding="ascii")
    with pytest.raises(InputError) as caught:
        read(folder, processors)
    message = str(caught.value)
    assert message.startswith(f"--dataset {folder}/captions.jsonl: line 1")
    assert reason in message
    assert "\n" not in message


def test_images_of_a_hub_cache_are_links(tmp_path: Path, processors: dict[str, Any]) -> None:
    """Its snapshots link to blobs; links to other places are refused as ever."""
    wanted = read(save_pairs(tmp_path / "pairs", 6), processors)
    for place in ("snapshots/abc", "snapshots/abc/data"):
        repository = tmp_path / place.replace("/", "-")
        folder = Path(shutil.copytree(tmp_path / "pairs", repository / place))
        (repository / "blobs").mkdir()
        for number, image in enumerate(sorted(folder.glob("*.png"))):
            blob = Path(shutil.move(image, repository / "blobs" / f"{number}"))
            image.symlink_to(os.path.relpath(blob, folder))
        found = read(folder, processors)
        assert found.sha256 == wanted.sha256
    outside = Path(shutil.move(repository / "blobs" / "0", tmp_path / "0"))
    (repository / "blobs" / "0").symlink_to(outside)
    with pytest.raises(InputError, match="is no file in that folder"):
        read(folder, processors)


def test_captions_are_read_in_any_encoding(tmp_path: Path, processors: dict[str, Any]) -> None:
    folder = save_pairs(tmp_path / "pairs", 6)
    wanted = read(folder, processors)
    captions = (folder / "captions.jsonl").read_text(encoding="utf-8")
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "captions.jsonl").write_text(captions.replace("\n", "\r\n\r\n"), encoding=encoding)
        assert read(folder, processors).sha256 == wanted.sha256
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    assert has_pairs(str(folder))
    assert read(folder, processors).sha256 == wanted.sha256


def test_a_lone_surrogate_in_a_caption_is_replaced(tmp_path: Path, processors: dict[str, Any]) -> None:
    write_rows(tmp_path, {"image": "a.png", "text": "broken \ud800 text"})
    grey(9).save(tmp_path / "a.png")
    assert read(tmp_path, processors).count == 1


def test_an_image_placeholder_in_a_caption_is_refused(tmp_path: Path, processors: dict[str, Any]) -> None:
    grey(9).save(tmp_path / "a.png")
    placeholder = processors[LLAVA].image_token
    write_rows(tmp_path, {"image": "a.png", "text": f"{placeholder}\nA river."})
    with pytest.raises(InputError, match=f"line 1: its text holds {placeholder}.*remove it"):
        read(tmp_path, processors, LLAVA)
    write_rows(tmp_path, {"image": "a.png", "text": "A river."})
    assert read(tmp_path, processors, LLAVA).count == 1


def test_a_folder_without_captions_has_no_pairs(tmp_path: Path) -> None:
    assert not has_pairs(str(tmp_path))
    (tmp_path / "captions.jsonl").touch()
    assert has_pairs(str(tmp_path))
    assert not has_pairs("wikitext2")
