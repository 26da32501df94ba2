"""Captions that a vision-language model writes for a folder of images."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.image_text import load_processor
from pgsvd_vllm.offline.data.sampled import captions as module
from pgsvd_vllm.offline.data.sampled.captions import LONGEST, SHORTEST, STAND_IN, Captions
from pgsvd_vllm.offline.data.sampled.generate import SampleError
from pgsvd_vllm.offline.data.sampled.self_text import Machine
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.messages import describe
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model

ROWS = {row.name: row for row in VISION_MODELS}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(ROWS["LLaVA 1.5"], tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_pairs(tmp_path / "images", 16)
    (folder / "captions.jsonl").unlink()
    (folder / ".hidden").touch()
    return folder


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]


def writer(model: Path, sample: bool = True, seed: int = 0, free: int | None = None) -> Captions:
    machine = Machine(torch.device("cpu"), torch.float32, free)
    return Captions(ModelSource(model), load_processor(model), machine, seed, sample)


def test_a_caption_is_what_the_model_generates(llava: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temperature of almost 0 it is the most likely one."""
    monkeypatch.setattr(module, "TEMPERATURE", 1e-7)
    found = writer(llava).of("d", opened(images)[:3])
    processor, model = load_processor(llava), ModelSource(llava).whole(torch.device("cpu"), torch.float32)
    for image, caption in zip(opened(images), found, strict=False):
        question = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
        prompt = f"{processor.image_token}\n"
        if processor.chat_template:
            turns = [{"role": "user", "content": question}]
            prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, min_new_tokens=SHORTEST, max_new_tokens=LONGEST)
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert caption == text.replace(processor.image_token, "").strip()


def test_captions_are_kept_and_depend_on_image_and_seed_alone(
    llava: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = opened(images)[:4]
    found = writer(llava).of("d", given)
    assert len(set(found)) == 4
    assert not any("<image>" in caption or caption == STAND_IN for caption in found)
    assert writer(llava, seed=1).of("d", given) != found
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(images.parent / "other"))
        assert writer(llava).of("d", given[::-1]) == found[::-1]
    monkeypatch.setattr(Captions, "_model", None)  # nothing is written that is known
    assert writer(llava).of("d", given) == found
    asked = writer(llava, sample=False)
    assert asked.of("d", given) == found
    assert asked.to_sample is None
    assert asked.of("d", opened(images)[:6]) == [*found, STAND_IN, STAND_IN]
    assert asked.to_sample is not None
    assert asked.to_sample.seconds > 0


def test_captions_that_are_written_survive_an_interruption(
    llava: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    caption = Captions._caption

    def interrupted(self: Captions, *arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return caption(self, *arguments)

    monkeypatch.setattr(Captions, "_caption", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer(llava).of("d", opened(images)[:4])
    assert len(writer(llava).of("d", opened(images)[:4])) == 4
    assert calls == 3 + 2


def test_images_alone_calibrate_a_vision_language_model(llava: Path, images: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    given: dict[str, Any] = {"dataset": (str(images),), "ratio": 0.3, "num_calibration_samples": 15}
    plan = make_plan(CompressOptions(str(llava), tmp_path / "out", **given))
    assert re.search(rf"15 images with texts \(by the model itself in about \d+ s\) from {images}", describe(plan))
    compress(CompressOptions(str(llava), tmp_path / "out", **given), say=lines.append)
    names = open_checkpoint(tmp_path / "out").modules
    assert any("vision" in name for name in names)
    assert any("language" in name for name in names)
    written = make_plan(CompressOptions(str(llava), tmp_path / "again", **given))
    assert written.data.to_sample is None
    assert written.data.sha256 != plan.data.sha256
    assert f"15 images with texts from {images}" in describe(written)


def test_images_alone_are_refused_where_no_captions_can_be_written(
    llava: Path, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    clip = save_vision_model(ROWS["CLIP"], tmp_path / "clip")
    for model, reason in ((clip, "holds images without texts; put captions.jsonl there"), (tiny_model, "no images")):
        with pytest.raises(InputError, match=reason):
            make_plan(CompressOptions(str(model), tmp_path / "out", dataset=(str(images),)))
    with pytest.raises(SampleError, match=rf"`dataset` d: .*{llava.name} does not fit .*; give captions.jsonl"):
        writer(llava, free=1000).of("d", opened(images))
    broken = shutil.copytree(llava, tmp_path / "broken")
    next(broken.glob("*.safetensors")).write_bytes(b"")
    captions = writer(llava)
    captions._source.folder = broken
    with pytest.raises(SampleError, match=r"`dataset` d: transformers cannot load .*; give captions.jsonl"):
        captions.of("d", opened(images))


def test_a_folder_with_other_files_holds_no_lone_images(llava: Path, images: Path, tmp_path: Path) -> None:
    (images / "notes.txt").write_text("word " * 3000, encoding="utf-8")
    plan = make_plan(CompressOptions(str(llava), tmp_path / "out", dataset=(str(images),), max_seq_length=64))
    assert plan.data.pairs is None


def test_images_with_texts_do_not_hash_the_model(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sampled_identity", None)
    pairs = save_pairs(tmp_path / "pairs", 16)
    assert make_plan(CompressOptions(str(llava), tmp_path / "out", dataset=(str(pairs),))).data.pairs is not None
