"""Calibration pairs: images and what is said of them, as the model's processor hands them to the model."""

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
# Images of equal size that a model which compares them with texts gets at a time.
PAIRS_PER_BATCH = 16
# Of images; others may run programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Pairs:
    """Image-text pairs, ready for the model.

    Attributes:
        batches: the arguments of the model's calls, in drawn order, or those of equal size together.
        count: pairs.
        name: where they came from.
        sha256: of the token ids and pixels.
    """

    batches: list[Batch]
    count: int
    name: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Of the texts, with what stands for images in them."""
        return sum(batch["input_ids"].numel() for batch in self.batches)


def has_pairs(dataset: str) -> bool:
    """Whether a data set is a folder with captions.jsonl, or the hub id of one with images, OWNER/NAME."""
    if os.path.isdir(dataset):
        return True
    return dataset.count("/") == 1 and not os.path.exists(dataset) and not dataset.startswith((".", "/", "~"))


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's processor of texts and images; raises InputError where none can be loaded."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise InputError(
            f"{folder}: no usable processor of images ({reason_of(error)}); put preprocessor_config.json beside "
            "config.json"
        ) from None


def read_pairs(dataset: str, count: int, seed: int, processor: Any, longest: int | None) -> Pairs:
    """The pairs of a data set; fewer than `count` where it has no more.

    Args:
        dataset: a folder with captions.jsonl, whose rows have an `image`, relative to the folder, and a `text`; or a
            hub id of the datasets library with columns of these names (`caption` will do for `text`).
        count: pairs wanted; of a folder they are drawn, of the hub they are the first ones.
        seed: of the draw.
        processor: the model's.
        longest: tokens of a text, of a model that compares images with texts; None of one that describes images.

    Raises:
        InputError: the data set, a row of it or an image cannot be used.
    """
    samples: list[Batch] = []
    rows = _folder_rows(Path(dataset), count, seed) if os.path.isdir(dataset) else _hub_rows(dataset, count)
    for label, image, text in rows:
        try:
            described = longest is None
            samples.append(
                _described(processor, image, text) if described else _compared(processor, image, text, longest)
            )
        except Exception as error:  # processors raise what they like
            raise InputError(f"{label}: the model's processor refuses it ({error})") from None
    if not samples:
        raise InputError(f"--dataset {dataset}: no pairs of an image and a text in it")
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            digest.update(sample[name].numpy().tobytes())
    batches = samples if longest is None else _grouped(samples)
    return Pairs(batches, len(samples), dataset, digest.hexdigest())


def mix_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several data sets as those of one, in turns."""
    turns = itertools.zip_longest(*(part.batches for part in parts))
    batches = [batch for turn in turns for batch in turn if batch is not None]
    names, digests = (sep.join(getattr(p, a) for p in parts) for sep, a in ((" + ", "name"), (" ", "sha256")))
    return Pairs(batches, sum(part.count for part in parts), names, digests)


def _folder_rows(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Image.Image, str]]:
    """A label for errors, the image and the text of drawn rows."""
    path = folder / CAPTIONS
    label = f"--dataset {folder}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{label}: {CAPTIONS} cannot be read ({error}); it has a row a line for every image") from None
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
        except Exception as error:  # decoders raise what they like
            raise InputError(f"{where}: {file} is no image that can be read ({error})") from None
        yield where, pixels, text


def _hub_rows(dataset: str, count: int) -> Iterator[tuple[str, Image.Image, str]]:
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset(dataset, split="train", streaming=True)):
            if number == count:
                return
            image, text = (_field(row, names) for names in (IMAGE_FIELDS, TEXT_FIELDS))
            if not isinstance(image, Image.Image) or not isinstance(text, str):
                raise InputError(f"--dataset {dataset}: its rows have no image and text, but {', '.join(row)}")
            yield f"--dataset {dataset}: row {number}", image.convert("RGB"), text
    except InputError:
        raise
    except Exception as error:  # network, hub and parquet layers each raise their own kinds
        raise InputError(
            f"--dataset {dataset}: neither a file or folder here nor images on the hub ({reason_of(error)}); give a "
            f"folder with images and {CAPTIONS}"
        ) from None


def _field(row: Any, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if isinstance(row, dict) and name in row), None)


def _compared(processor: Any, image: Image.Image, text: str, longest: int | None) -> Batch:
    # A tokenizer without masks: the model was trained on texts that are filled up, and reads the filling.
    masks = "attention_mask" in processor.tokenizer.model_input_names
    options: dict[str, Any] = {"truncation": True, "max_length": longest} | ({} if masks else {"padding": "max_length"})
    return _tensors(processor(text=[text], images=[image], return_tensors="pt", **options))


def _described(processor: Any, image: Image.Image, text: str) -> Batch:
    if processor.chat_template:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        whole = processor.apply_chat_template([asked, said], tokenize=False)
    else:
        whole = f"{processor.image_token}\n{text}"
    # Templates may begin with what the tokenizer would put in front as well.
    begun = bool(processor.tokenizer.bos_token) and whole.startswith(processor.tokenizer.bos_token)
    return _tensors(processor(text=[whole], images=[image], return_tensors="pt", add_special_tokens=not begun))


def _tensors(found: Any) -> Batch:
    """What the processor made, less a mask that hides nothing."""
    batch = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


def _grouped(samples: Sequence[Batch]) -> list[Batch]:
    """Samples of equal shapes as batches of at most PAIRS_PER_BATCH."""
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
