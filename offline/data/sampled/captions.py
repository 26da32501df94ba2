"""Captions that a vision-language model writes for given images, kept in the user's cache, continued after a stop."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from pgsvd_vllm.errors import reason_of
from pgsvd_vllm.offline.data.image_text import prompted, question
from pgsvd_vllm.offline.data.sampled.generate import SampleError
from pgsvd_vllm.offline.data.sampled.self_text import (
    STEP_SECONDS,
    TEMPERATURE,
    Machine,
    Sampling,
    cache_folder,
    sampled_identity,
    write_cached,
)
from pgsvd_vllm.offline.model.source import ModelSource

# Tokens of a caption: the model may end it between these.
SHORTEST, LONGEST = 8, 96
# Bytes of weights that a token reads in a second.
WEIGHT_RATE = {"cpu": 1.5e10, "cuda": 1e12}
# Stands for captions that have not been written yet; as long as the longest one in most tokenizers.
STAND_IN = " ".join(["word"] * LONGEST)
# Version of the stored captions; increment it with every change of what is written.
VERSION = 1


class Captions:
    """The captions of one model.

    Args:
        source: a vision-language model, which generates text.
        processor: of the model.
        machine: that samples.
        seed: of the draws.
        sample: whether to write captions that are not in the cache; otherwise stand-ins take their place.
    """

    def __init__(self, source: ModelSource, processor: Any, machine: Machine, seed: int, sample: bool) -> None:
        self._source, self._processor, self._machine, self._seed = source, processor, machine, seed
        self._sample = sample
        self._missing = 0

    @cached_property
    def _folder(self) -> Path:
        """The folder of the model's captions; data sets with texts of their own need not hash the model for it."""
        tokens = [SHORTEST, LONGEST, TEMPERATURE]
        parts = {"prompt": question(self._processor), "tokens": tokens, "version": VERSION}
        identity = sampled_identity(self._source, self._machine, self._seed, parts)
        return cache_folder() / "captions" / identity[:32]

    @property
    def to_sample(self) -> Sampling | None:
        """What it takes to write the captions for which stand-ins were given; None if there are none."""
        if not self._missing:
            return None
        machine, nbytes = self._machine, self._source.weights.numel * self._machine.dtype.itemsize
        rate = WEIGHT_RATE.get(machine.device.type, WEIGHT_RATE["cuda"])
        step = max(nbytes / rate, len(self._source.layers) * STEP_SECONDS)
        return Sampling(self._missing * LONGEST * step, 2 * nbytes)

    def of(self, dataset: str, images: list[Image.Image]) -> list[str]:
        """One caption for each RGB image, with a progress bar; `dataset` is named in errors.

        Raises:
            InputError: the cache cannot be written.
            SampleError: the model cannot be loaded or generate, or does not fit into memory.
        """
        files = [self._folder / f"{_digest(image)}.txt" for image in images]
        captions = {file: caption for file in files if (caption := _read(file)) is not None}
        missing = {file: image for file, image in zip(files, images, strict=True) if file not in captions}
        if self._sample and missing:
            captions |= self._written(dataset, missing)
        elif missing:
            self._missing += len(missing)
        return [captions.get(file, STAND_IN) for file in files]

    def _written(self, dataset: str, missing: dict[Path, Image.Image]) -> dict[Path, str]:
        """Write the captions of images into their files; returns them."""
        captions: dict[Path, str] = {}
        try:
            model = self._model()
            for file, image in tqdm(missing.items(), unit="image", desc="captions"):
                captions[file] = self._caption(model, image, int(file.stem[:8], 16))
                _write(file, captions[file])
        except SampleError as error:
            raise SampleError(f"`dataset` {dataset}: {error}; give captions.jsonl") from None
        return captions

    def _model(self) -> Any:
        source, machine = self._source, self._machine
        if machine.free is not None and source.weights.numel * machine.dtype.itemsize > 0.8 * machine.free:
            raise SampleError(f"{source.folder} does not fit into memory as a whole, which writing captions needs")
        try:
            return source.whole(machine.device, machine.dtype)
        except Exception as error:  # damaged weights, lack of memory, and what else transformers meets
            raise SampleError(f"transformers cannot load {source.folder} as a whole ({reason_of(error)})") from None

    def _caption(self, model: Any, image: Image.Image, number: int) -> str:
        """A caption, drawn with a seed that depends on the image's number."""
        try:
            batch = prompted(self._processor, image, question(self._processor))
            inputs = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(number ^ (self._seed & 0xFFFFFFFF))
                ids = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=SHORTEST,
                    max_new_tokens=LONGEST,
                )
            tokenizer = self._processor.tokenizer
            text = str(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
        except Exception as error:  # generation fails in many ways
            raise SampleError(
                f"{self._source.folder} cannot write captions in transformers ({reason_of(error)})"
            ) from None
        # What the model may not write itself: the token that stands for an image in prompts.
        return text.replace(getattr(self._processor, "image_token", None) or "\0", "").strip() or STAND_IN


def _digest(image: Image.Image) -> str:
    """SHA-256 of an RGB image."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _read(file: Path) -> str | None:
    """A caption of the cache; None without a usable one."""
    try:
        return file.read_bytes().decode("utf-8") or None
    except (OSError, ValueError):
        return None


def _write(file: Path, caption: str) -> None:
    """Write a caption into the cache; raises InputError if that fails."""

    def write(own: Path) -> None:
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(caption.encode("utf-8", "replace"))

    write_cached(file, write)
