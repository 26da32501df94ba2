"""Reads image-text pairs for calibration and turns them into batches with the model's processor."""

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.data.hub_rows import hub_rows, is_hub_id
from pgsvd_vllm.offline.data.row_files import PlacedRow, read_rows
from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.links import stays_inside

CAPTIONS = "captions.jsonl"
# The datasets library's name for the same file.
CAPTION_FILES = (CAPTIONS, "metadata.jsonl")
IMAGE_FIELDS, TEXT_FIELDS = ("image", "file_name"), ("text", "caption")
PROMPT = "Describe this image."
# Pairs of equal shape in one batch of a dual encoder.
PAIRS_PER_BATCH = 16
# Image formats that Pillow decodes itself; for others it may start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Writes one text for each RGB image of a data set, which is named for errors.
Describe = Callable[[str, list[Image.Image]], list[str]]


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
    """Whether a data set holds images: a folder with a file of captions or of images alone, or a hub data set of pairs.

    Raises:
        InputError: neither the hub nor its cache has the data set.
    """
    if os.path.isdir(dataset):
        return _captions_in(Path(dataset)) is not None or bool(_lone_images(Path(dataset)))
    if not is_hub_id(dataset):
        return False
    return any(isinstance(_field(row, IMAGE_FIELDS), Image.Image) for _, row in _hub_rows(dataset, 1))


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's processor of texts and images; raises InputError if it cannot be loaded."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise InputError(
            f"{folder}: no usable image processor ({reason_of(error)}); put preprocessor_config.json beside config.json"
        ) from None


def read_pairs(
    dataset: str, count: int, seed: int, processor: Any, longest: int | None, describe: Describe | None = None
) -> Pairs:
    """Read the pairs of a data set; fewer than `count` if it has no more.

    Args:
        dataset: a folder with captions.jsonl or metadata.jsonl, whose rows have an `image`, relative to the folder, and
            a `text`; or a hub id of the datasets library with columns of these names. `file_name` and `caption` are
            accepted as well. Or a folder of images alone, whose texts `describe` writes.
        count: number of pairs; drawn at random from a folder, the first ones of a hub data set.
        seed: of the draw.
        processor: of the model.
        longest: maximum tokens of a text for a dual encoder; None for a vision-language model.
        describe: None if images without texts are refused.

    Raises:
        InputError: the data set, one of its rows or an image cannot be used; names it.
    """
    samples: list[Batch] = []
    folder = Path(dataset) if os.path.isdir(dataset) else None
    placeholder = getattr(processor, "image_token", None)
    if folder is not None and _captions_in(folder) is None:
        pairs = _described_images(folder, count, seed, describe)
    else:
        rows = _hub_rows(dataset, count) if folder is None else _drawn_rows(folder, count, seed)
        pairs = ((label, *_pair(label, row, folder, placeholder)) for label, row in rows)
    for label, image, text in pairs:
        try:
            samples.append(
                _description(processor, image, text)
                if longest is None
                else _dual_encoder_sample(processor, image, text, longest)
            )
        except Exception as error:  # processors raise exceptions of many types
            raise InputError(f"{label}: the model's processor rejected it ({reason_of(error)})") from None
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


def _drawn_rows(folder: Path, count: int, seed: int) -> Iterator[PlacedRow]:
    """Draw rows of a folder's captions."""
    path = _captions_in(folder) or folder / CAPTIONS
    rows = [(f"--dataset {path}: {place}", row) for place, row in read_rows(path, ".jsonl")]
    return iter(_drawn(rows, count, seed))


def _drawn(values: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of some values in random order."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    return [values[i] for i in order[:count]]


def _captions_in(folder: Path) -> Path | None:
    """The folder's file of captions, if it has one."""
    return next((folder / name for name in CAPTION_FILES if os.path.isfile(folder / name)), None)


def _lone_images(folder: Path) -> list[str]:
    """The names of a folder's files if all of them are images; else none. Hidden files do not count."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:  # reading its text says why
        return []
    return names if all(name.lower().endswith(SUFFIXES) for name in names) else []


def _described_images(
    folder: Path, count: int, seed: int, describe: Describe | None
) -> Iterator[tuple[str, Image.Image, str]]:
    """Draw images of a folder; yields their labels, the images and the texts that are written for them.

    Raises:
        InputError: an image cannot be used, or no texts can be written.
    """
    if describe is None:
        raise InputError(
            f"--dataset {folder}: holds images without texts; put {CAPTIONS} there, with one row with image and text "
            "per image"
        )
    names = _drawn(_lone_images(folder), count, seed)
    labels = [f"--dataset {folder}: {name if name.isprintable() else ascii(name)}" for name in names]
    images = [_read_image(label, folder, name) for label, name in zip(labels, names, strict=True)]
    return zip(labels, images, describe(str(folder), images), strict=True)


def _hub_rows(dataset: str, count: int) -> Iterator[PlacedRow]:
    """The first rows of a hub data set."""
    rows = hub_rows(dataset, f"give a folder with images and {CAPTIONS}")
    return ((f"--dataset {dataset}: {place}", row) for place, row in itertools.islice(rows, count))


def _pair(label: str, row: Any, folder: Path | None, placeholder: str | None) -> tuple[Image.Image, str]:
    """The RGB image and the text of a row.

    Args:
        label: names the row in errors.
        row: any value.
        folder: that holds the images; None where rows hold the images themselves.
        placeholder: text that stands for an image; None for processors without one.
    """
    image, text = (_field(row, names) for names in (IMAGE_FIELDS, TEXT_FIELDS))
    if not isinstance(image, Image.Image if folder is None else str) or not isinstance(text, str):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else str(row)
        raise InputError(f'{label} has no "image" or no "text", only {found[:200] or "nothing"}')
    if not text.strip():
        raise InputError(f"{label} has an empty text")
    if placeholder and placeholder in text:
        raise InputError(f"{label}: its text holds {placeholder}, which stands for an image in prompts; remove it")
    # JSON may hold halves of surrogate pairs, which no tokenizer takes.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _read_image(label, folder or Path(), image), text


def _read_image(label: str, folder: Path, image: Image.Image | str) -> Image.Image:
    """An image, or the image of that name in a folder, as RGB; raises InputError if it cannot be read."""
    try:
        return _rgb(image) if isinstance(image, Image.Image) else _open_image(label, folder, image)
    except InputError:
        raise
    except Exception as error:  # decoders raise exceptions of many types
        raise InputError(f"{label}: {image} is no image that can be read ({reason_of(error)})") from None


def _open_image(label: str, folder: Path, name: str) -> Image.Image:
    """An image file as RGB; raises InputError for a name that leads out of the folder."""
    file = folder / name
    try:
        inside = stays_inside(file, folder) and file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside = False
    if not inside:
        raise InputError(f"{label}: {file if name.isprintable() else ascii(name)} is no file in that folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as opened:
            return _rgb(opened)


def _rgb(image: Image.Image) -> Image.Image:
    """The first frame of an image as RGB; Pillow itself would clip 16 bits to 8.

    Raises:
        ValueError: 32 bits a channel, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}); store it with 8 bits")
    return image.convert("RGB")


def _field(row: Any, names: Sequence[str]) -> Any:
    """The value of the first of some keys that a row has; None without any."""
    return next((row[name] for name in names if isinstance(row, dict) and row.get(name) is not None), None)


def _dual_encoder_sample(processor: Any, image: Image.Image, text: str, longest: int) -> Batch:
    """An image and a text for a dual encoder."""
    # Tokenizers without attention masks (SigLIP) belong to models that were trained on padded texts.
    masks = "attention_mask" in processor.tokenizer.model_input_names
    options: dict[str, Any] = {"truncation": True, "max_length": longest} | ({} if masks else {"padding": "max_length"})
    return _tensors(processor(text=[text], images=[image], return_tensors="pt", **options))


def _description(processor: Any, image: Image.Image, text: str) -> Batch:
    """An image and its description for a vision-language model, as a user and an assistant turn."""
    if processor.chat_template:
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return prompted(processor, image, processor.apply_chat_template([_QUESTION, answer], tokenize=False))
    return prompted(processor, image, question(processor) + text)


_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}


def question(processor: Any) -> str:
    """The prompt that a vision-language model continues with a description of an image."""
    if processor.chat_template:
        return str(processor.apply_chat_template([_QUESTION], tokenize=False, add_generation_prompt=True))
    return f"{processor.image_token}\n"


def prompted(processor: Any, image: Image.Image, prompt: str) -> Batch:
    """An image and a prompt that holds its place, as the model's inputs."""
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
