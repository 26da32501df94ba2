"""The calibration set of one run: windows of text, images with texts, or both."""

import itertools
from dataclasses import dataclass

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.image_text import Pairs, has_pairs, load_processor, mix_pairs, read_pairs
from pgsvd_vllm.offline.data.text import (
    Windows,
    cut_windows,
    load_tokenizer,
    mix_windows,
    no_windows,
    read_documents,
    tokenize,
)
from pgsvd_vllm.offline.model.batch import Batch, text_batches
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import LANGUAGE
from pgsvd_vllm.offline.options import BUILTIN, HELD_OUT, PAIRS, WINDOWS, CompressOptions


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data.

    Attributes:
        windows: token windows of text; empty if all samples are image-text pairs.
        pairs: images with texts, or None.
        tokens_per_pixel: tokens of the vision encoder per element of `pixel_values`.
    """

    windows: Windows
    pairs: Pairs | None = None
    tokens_per_pixel: float = 0.0

    @property
    def samples(self) -> int:
        """Number of windows and pairs."""
        return len(self.windows.ids) + (self.pairs.count if self.pairs else 0)

    @property
    def tokens(self) -> int:
        """Tokens of all windows and texts, image placeholders included."""
        return self.windows.ids.numel() + (self.pairs.tokens if self.pairs else 0)

    @property
    def length(self) -> int:
        """Tokens of the longest window or text."""
        longest = [batch["input_ids"].shape[1] for batch in (self.pairs.batches if self.pairs else [])]
        return max([*longest, self.windows.ids.shape[1] if len(self.windows.ids) else 0])

    @property
    def name(self) -> str:
        """The names of the data sets, joined by ` + `."""
        names = [self.windows.name] if len(self.windows.ids) else []
        return " + ".join([*names, self.pairs.name] if self.pairs else names)

    @property
    def sha256(self) -> str:
        """SHA-256 of the token ids, followed by that of the pairs if there are any."""
        return f"{self.windows.sha256} {self.pairs.sha256}" if self.pairs else self.windows.sha256

    def vision_tokens(self, batch: Batch) -> int:
        """Tokens of the vision encoder for a batch's images; 0 without images."""
        return round(self.tokens_per_pixel * batch["pixel_values"].numel()) if "pixel_values" in batch else 0

    def tokens_of(self, tower: str) -> int:
        """Tokens that run through a tower, such as `language` or `vision`."""
        if tower == LANGUAGE:
            return self.tokens
        return sum(self.vision_tokens(batch) for batch in (self.pairs.batches if self.pairs else []))

    def batches(self, tokens: int | None = None) -> list[Batch]:
        """The batches of the set, pairs and windows in turn.

        Args:
            tokens: to return; the last batch may exceed it. None for all.
        """
        ids, pairs = self.windows.ids, self.pairs.batches if self.pairs else []
        if tokens is not None:
            tokens //= 2 if len(ids) and pairs else 1
            ids = ids[: max(1, tokens // ids.shape[1])]
            weights = (max(batch["input_ids"].numel(), self.vision_tokens(batch)) for batch in pairs[:-1])
            ends = itertools.accumulate(weights, initial=0)
            pairs = pairs[: sum(before < tokens for before in ends)]
        turns = itertools.zip_longest(pairs, text_batches(ids))
        return [batch for turn in turns for batch in turn if batch is not None]


def read_calibration_set(options: CompressOptions, source: ModelSource) -> CalibrationSet:
    """Read the data sets that the options name, an equal share of samples from each.

    Args:
        options: checked by `check_options`.
        source: the model; its folder holds the tokenizer and the processor.

    Returns:
        The set, with `tokens_per_pixel` still 0.

    Raises:
        InputError: a data set, the tokenizer or the processor cannot be read; the model takes no images, or it needs
            pairs and gets text; or a text has too few tokens for one window and the held-out ones.
    """
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None) or options.max_seq_length
    length = min(options.max_seq_length, limit)
    texts = [dataset for dataset in options.dataset if not has_pairs(dataset)]
    folders = [dataset for dataset in options.dataset if has_pairs(dataset)]
    if folders and not source.reads_images:
        raise InputError(
            f"--dataset {folders[0]}: no such file, and {options.model} reads no images; give a text file, wikitext2, "
            f"c4 or {BUILTIN} (offline)"
        )
    if texts and source.is_dual_encoder:
        raise InputError(
            f"--dataset {texts[0]}: {options.model} compares images with texts and needs both; give a folder with "
            "images and captions.jsonl, which has one row with image and text per image"
        )
    samples = options.num_calibration_samples or (PAIRS if source.is_dual_encoder else WINDOWS)
    counts = {dataset: len(range(i, samples, len(options.dataset))) for i, dataset in enumerate(options.dataset)}
    windows = _windows(options, source, length, [(dataset, max(1, counts[dataset])) for dataset in texts])
    if not folders:
        return CalibrationSet(windows)
    processor = load_processor(source.folder, options.trust_remote_code)
    longest = source.config.get_text_config().max_position_embeddings if source.is_dual_encoder else None
    parts = [read_pairs(f, max(1, counts[f]), options.seed, processor, longest) for f in folders]
    return CalibrationSet(windows, mix_pairs(parts))


def _windows(options: CompressOptions, source: ModelSource, length: int, requests: list[tuple[str, int]]) -> Windows:
    """Cut the calibration windows from texts; `requests` holds pairs of a data set and its number of windows."""
    if not requests:
        return no_windows(length)
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    spare = 0 if options.refine is None else HELD_OUT
    parts = []
    for dataset, count in requests:
        left_over = -(-spare // len(requests))
        documents = read_documents(dataset, (count + left_over) * length, tokenizer, options.chat_template)
        text = tokenize(tokenizer, documents, dataset)
        parts.append(cut_windows(text, count, length, options.seed, left_over))
    return mix_windows(parts)
