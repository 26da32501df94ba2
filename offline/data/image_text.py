"""Reads image-text pairs for calibration and turns them into batches with the model's processor."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.model.batch import Batch

CAPTIONS = "captions.jsonl"
IMAGE_FIELDS, TEXT_FIELDS = ("image", "file_name"), ("text", "caption")
PROMPT = "Describe this image."
# Pairs of equal shape in one batch of a dual encoder.
PAIRS_PER_BATCH = 16
# Image formats that Pillow decodes itself; for others it may start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Pairs:
    """Image-text pairs, ready for the model.

    Attributes:
        batches: one pair each, in drawn order; for a dual encoder up to PAIRS_PER_BATCH pairs of equal shape each.
        count: number of pairs.
        name: of the data set.
        sha256: of the token ids and pixels.
    """

    batches: list[Batch]
    count: int
    name: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of the texts, image placeholders included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)


def has_pairs(dataset: str) -> bool:
    """Whether a data set is a folder, which must hold captions.jsonl, or looks like the hub id OWNER/NAME of one."""
    if os.path.isdir(dataset):
        return True
    return dataset.count("/") == 1 and not os.path.exists(dataset) and not dataset.startswith((".", "/", "~"))


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's processor of texts and images; raises InputError if it cannot be loaded."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise InputError(
            f"{folder}: no usable image processor ({reason_of(error)}); put preprocessor_config.json beside config.json"
        ) from None


def read_pairs(dataset: str, count: int, seed: int, processor: Any, longest: int | None) -> Pairs:
    """Read the pairs of a data set; fewer than `count` if it has no more.

    Args:
        dataset: a folder with captions.jsonl, whose rows have an `image`, relative to the folder, and a `text`; or a
            hub id of the datasets library with columns of these names. `file_name` and `caption` are accepted as well.
        count: number of pairs; drawn at random from a folder, the first ones of a hub data set.
        seed: of the draw.
        processor: of the model.
        longest: maximum tokens of a text for a dual encoder; None for a vision-language model.

    Raises:
        InputError: the data set, one of its rows or an image cannot be used; names it.
    """
    samples: list[Batch] = []
    rows = _folder_rows(Path(dataset), count, seed) if os.path.isdir(dataset) else _hub_rows(dataset, count)
    for label, image, text in rows:
        try:
            samples.append(
                _description(processor, image, text)
                if longest is None
                else _dual_encoder_sample(processor, image, text, longest)
            )
        except Exception as error:  # processors raise exceptions of many types
            raise InputError(f"{label}: the model's processor rejected it ({error})") from None
    if not samples:
        raise InputError(f"--dataset {dataset}: contains no pairs of an image and a text")
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            digest.update(sample[name].numpy().tobytes())
    batches = samples if longest is None else _grouped(samples)
    return Pairs(batches, len(samples), dataset, digest.hexdigest())


def mix_pairs(parts: Sequence[Pairs]) -> Pairs:
    """Combine the pairs of several data sets, batches in turn."""
    turns = itertools.zip_longest(*(part.batches for part in parts))
    batches = [batch for turn in turns for batch in turn if batch is not None]
    names, digests = (sep.join(getattr(p, a) for p in parts) for sep, a in ((" + ", "name"), (" ", "sha256")))
    return Pairs(batches, sum(part.count for part in parts), names, digests)


def _folder_rows(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Image.Image, str]]:
    """Draw rows: the location for error messages, the RGB image and the text of each."""
    path = folder / CAPTIONS
    label = f"--dataset {folder}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{label}: {CAPTIONS} cannot be read ({error}); it needs one row per image") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    order = torch.randperm(len(numbered), generator=torch.Generator().manual_seed(seed)).tolist()
    for number, line in (numbered[i] for i in order[:count]):
        where = f"{label}: {CAPTIONS} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is not JSON") from None
        image, text = (_field(row, names) for names in (IMAGE_FIELDS, TEXT_FIELDS))
        if not isinstance(image, str) or not isinstance(text, str):
            raise InputError(f'{where} has no "image" or no "text"')
        file = folder / image
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise InputError(f"{where}: {file} is no file in that folder")
        try:
            with Image.open(file, formats=FORMATS) as opened:
                pixels = opened.convert("RGB")
        except Exception as error:  # decoders raise exceptions of many types
            raise InputError(f"{where}: {file} is no image that can be read ({error})") from None
        yield where, pixels, text


def _hub_rows(dataset: str, count: int) -> Iterator[tuple[str, Image.Image, str]]:
    """Stream the first rows of a hub data set: the location for error messages, the RGB image and the text of each."""
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset(dataset, split="train", streaming=True)):
            if number == count:
                return
            image, text = (_field(row, names) for names in (IMAGE_FIELDS, TEXT_FIELDS))
            if not isinstance(image, Image.Image) or not isinstance(text, str):
                raise InputError(f"--dataset {dataset}: its rows have no image and text, only {', '.join(row)}")
            yield f"--dataset {dataset}: row {number}", image.convert("RGB"), text
    except InputError:
        raise
    except Exception as error:  # network, hub and parquet layers raise exceptions of many types
        raise InputError(
            f"--dataset {dataset}: no such file or folder, and the hub does not provide it ({reason_of(error)}); "
            f"give a folder with images and {CAPTIONS}"
        ) from None


def _field(row: Any, names: Sequence[str]) -> Any:
    """The value of the first of some keys that a row has; None without any."""
    return next((row[name] for name in names if isinstance(row, dict) and name in row), None)


def _dual_encoder_sample(processor: Any, image: Image.Image, text: str, longest: int) -> Batch:
    """An image and a text for a dual encoder."""
    # Tokenizers without attention masks (SigLIP) belong to models that were trained on padded texts.
    masks = "attention_mask" in processor.tokenizer.model_input_names
    options: dict[str, Any] = {"truncation": True, "max_length": longest} | ({} if masks else {"padding": "max_length"})
    return _tensors(processor(text=[text], images=[image], return_tensors="pt", **options))


def _description(processor: Any, image: Image.Image, text: str) -> Batch:
    """An image and its description for a vision-language model, as a user and an assistant turn."""
    if processor.chat_template:
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        prompt = processor.apply_chat_template([question, answer], tokenize=False)
    else:
        prompt = f"{processor.image_token}\n{text}"
    # Some chat templates write BOS themselves; the tokenizer must not add a second one.
    has_bos = bool(processor.tokenizer.bos_token) and prompt.startswith(processor.tokenizer.bos_token)
    return _tensors(processor(text=[prompt], images=[image], return_tensors="pt", add_special_tokens=not has_bos))


def _tensors(found: Any) -> Batch:
    """The tensors of a processor's output, without an attention mask that masks nothing."""
    batch = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


def _grouped(samples: Sequence[Batch]) -> list[Batch]:
    """Stack samples of equal shapes into batches of at most PAIRS_PER_BATCH."""
    groups: dict[Any, list[list[Batch]]] = {}
    for sample in samples:
        shapes = tuple((name, tuple(value.shape)) for name, value in sorted(sample.items()))
        batches = groups.setdefault(shapes, [[]])
        if len(batches[-1]) == PAIRS_PER_BATCH:
            batches.append([])
        batches[-1].append(sample)
    return [
        {name: torch.cat([sample[name] for sample in batch]) for name in batch[0]}
        for batches in groups.values()
        for batch in batches
    ]
