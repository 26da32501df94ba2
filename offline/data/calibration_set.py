"""The calibration set of one run: windows of text, images with texts, or both."""

import itertools
import os
from dataclasses import dataclass

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.image_text import Pairs, has_pairs, load_processor, mix_pairs, read_pairs
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents
from pgsvd_vllm.offline.data.text_worth import check_worth
from pgsvd_vllm.offline.data.tokens import Windows, cut_windows, mix_windows, no_windows, tokenize
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
        warnings: why the text may be worth little; empty if nothing speaks against it.
    """

    windows: Windows
    pairs: Pairs | None = None
    tokens_per_pixel: float = 0.0
    warnings: tuple[str, ...] = ()

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
    def nbytes(self) -> int:
        """Memory of all windows, texts and images in bytes."""
        tensors = [t for batch in (self.pairs.batches if self.pairs else []) for t in batch.values()]
        return sum(t.nbytes for t in (self.windows.ids, self.windows.others, *tensors))

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
            pairs and gets text; or a text has too few tokens for one window and the held-out ones, or is worthless.
    """
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    # XLNet's -1 means any length.
    length = min(options.max_seq_length, limit) if limit and limit > 0 else options.max_seq_length
    texts, folders = _kinds(options, source)
    samples = options.num_calibration_samples or (PAIRS if source.is_dual_encoder else WINDOWS)
    counts = {dataset: len(range(i, samples, len(options.dataset))) for i, dataset in enumerate(options.dataset)}
    windows, warnings = _windows(options, source, length, [(d, max(1, counts[d])) for d in texts])
    if not folders:
        return CalibrationSet(windows, warnings=warnings)
    processor = load_processor(source.folder, options.trust_remote_code)
    longest = source.config.get_text_config().max_position_embeddings if source.is_dual_encoder else None
    parts = [read_pairs(f, max(1, counts[f]), options.seed, processor, longest) for f in folders]
    return CalibrationSet(windows, mix_pairs(parts), warnings=warnings)


def _kinds(options: CompressOptions, source: ModelSource) -> tuple[list[str], list[str]]:
    """The data sets of text, and those of images with texts; raises InputError for a kind that the model cannot use."""
    texts: list[str] = []
    folders: list[str] = []
    for dataset in options.dataset:
        if options.dataset.count(dataset) > 1:
            raise InputError(f"--dataset {dataset}: given twice; name every data set once")
        # A language model takes the texts of any hub data set.
        paired = (source.reads_images or os.path.isdir(dataset)) and has_pairs(dataset)
        if paired and not source.reads_images:
            raise InputError(
                f"--dataset {dataset}: holds images with texts, and {options.model} reads no images; give a text "
                f"file, wikitext2, c4 or {BUILTIN} (offline)"
            )
        if not paired and source.is_dual_encoder:
            raise InputError(
                f"--dataset {dataset}: {options.model} compares images with texts and needs both; give a folder with "
                "images and captions.jsonl, which has one row with image and text per image"
            )
        (folders if paired else texts).append(dataset)
    return texts, folders


def _windows(
    options: CompressOptions, source: ModelSource, length: int, requests: list[tuple[str, int]]
) -> tuple[Windows, tuple[str, ...]]:
    """The windows of texts, and warnings; `requests` holds data sets with their numbers of windows."""
    if not requests:
        return no_windows(length), ()
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    spare = 0 if options.refine is None else HELD_OUT
    parts, warnings = [], []
    for dataset, count in requests:
        left_over = -(-spare // len(requests))
        documents = read_documents(dataset, (count + left_over) * length, tokenizer, options.chat_template)
        text = tokenize(tokenizer, documents, dataset)
        windows = cut_windows(text, count, length, options.seed, left_over)
        warnings += check_worth(windows, len(text.prefix))
        parts.append(windows)
    return mix_windows(parts), tuple(warnings)
