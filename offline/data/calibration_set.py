"""The calibration set of one run: windows of text, images with texts, or both."""

import itertools
import math
import os
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.hub_rows import HUB_SETS
from pgsvd_vllm.offline.data.image_text import Pairs, has_pairs, load_processor, mix_pairs, read_pairs
from pgsvd_vllm.offline.data.sampled.captions import Captions
from pgsvd_vllm.offline.data.sampled.self_text import Machine, Sampling, SelfText, piece_length, rows_in_memory, sum_of
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents
from pgsvd_vllm.offline.data.text_worth import check_worth
from pgsvd_vllm.offline.data.tokens import (
    Windows,
    as_windows,
    cut_windows,
    mix_windows,
    no_windows,
    tokenize,
    window_length,
)
from pgsvd_vllm.offline.model.batch import Batch, text_batches
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.towers import LANGUAGE
from pgsvd_vllm.offline.options import (
    BUILTIN,
    CALIBRATION_FLOPS,
    CPU_WINDOWS,
    FRESH_SHARE,
    FRESH_WINDOWS,
    GENEROUS_WINDOWS,
    GPU_FLOPS,
    GPU_GROWTH,
    HELD_OUT,
    PAIRS,
    SELF,
    WINDOWS,
    CompressOptions,
    Dose,
)


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data.

    Attributes:
        windows: token windows of text; empty if all samples are image-text pairs.
        pairs: images with texts, or None.
        tokens_per_pixel: tokens of the vision encoder per element of `pixel_values`.
        warnings: why the text may be worth little; empty if nothing speaks against it.
        to_sample: what it takes to sample the windows for which `windows` holds stand-ins; None without any.
    """

    windows: Windows
    pairs: Pairs | None = None
    tokens_per_pixel: float = 0.0
    warnings: tuple[str, ...] = ()
    to_sample: Sampling | None = None

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


def with_data_defaults(options: CompressOptions, source: ModelSource, machine: Machine) -> CompressOptions:
    """The options with the default data set, and the number of windows where it depends on the machine.

    Args:
        options: of the run.
        source: the model.
        machine: that would sample.

    Returns:
        Options whose `dataset` is set: `self` for a model that generates text and fits into memory as a whole.
    """
    if options.dataset is None:
        rows = rows_in_memory(source, machine, piece_length(options.max_seq_length))
        can = source.model.can_generate() and rows > 0
        options = replace(options, dataset=(SELF if can else BUILTIN,))
    if options.num_calibration_samples is not None:
        return options
    if machine.device.type == "cpu":
        return replace(options, num_calibration_samples=CPU_WINDOWS) if options.dataset == (SELF,) else options
    if source.reads_images:
        return options
    affordable = int(GPU_FLOPS / (CALIBRATION_FLOPS * source.weights.numel * options.max_seq_length))
    return replace(options, num_calibration_samples=max(WINDOWS, min(GPU_GROWTH * WINDOWS, affordable)))


class DataReader:
    """Reads the data sets that the options of a run name, an equal share of samples from each.

    Args:
        options: checked by `check_options`, with `dataset` set.
        source: the model; its folder holds the tokenizer and the processor.
        machine: that samples text from the model itself.
        dose: of knowledge distillation, which needs windows of its own.
    """

    def __init__(self, options: CompressOptions, source: ModelSource, machine: Machine, dose: Dose | None) -> None:
        assert options.dataset is not None
        self._options, self._source, self._machine, self._datasets = options, source, machine, options.dataset
        self._dose = dose
        self._length = window_length(source.config, options.max_seq_length)

    def read(self, sample: bool) -> CalibrationSet:
        """The calibration set, with `tokens_per_pixel` still 0.

        Args:
            sample: whether to sample windows that are not in the cache; otherwise stand-ins take their place.

        Raises:
            InputError: a data set, the tokenizer or the processor cannot be read; the model takes no images, or it
                needs pairs and gets text; a text has too few tokens for one window and the held-out ones, or is
                worthless; or the model cannot generate text.
        """
        options, source = self._options, self._source
        texts, folders = self._kinds()
        samples = options.num_calibration_samples or (PAIRS if source.is_dual_encoder else WINDOWS)
        counts = {dataset: len(range(i, samples, len(self._datasets))) for i, dataset in enumerate(self._datasets)}
        found = self._windows([(d, max(1, counts[d])) for d in texts], sample)
        if not folders:
            return found
        processor = load_processor(source.folder, options.trust_remote_code)
        longest = source.config.get_text_config().max_position_embeddings if source.is_dual_encoder else None
        captions = Captions(source, processor, self._machine, options.seed, sample) if longest is None else None
        describe = None if captions is None else captions.of
        parts = [read_pairs(f, max(1, counts[f]), options.seed, processor, longest, describe) for f in folders]
        missing = (found.to_sample, None if captions is None else captions.to_sample)
        to_sample = [one for one in missing if one is not None]
        return replace(found, pairs=mix_pairs(parts), to_sample=sum_of(to_sample))

    def _kinds(self) -> tuple[list[str], list[str]]:
        """The data sets of text, and those of images with texts; raises InputError for a kind the model cannot use."""
        options, source = self._options, self._source
        texts: list[str] = []
        folders: list[str] = []
        if options.text_column is not None and all(name in (SELF, BUILTIN, *HUB_SETS) for name in self._datasets):
            raise InputError(
                f"`text_column` {options.text_column}: names a field of the rows of a --dataset of your own; name that "
                "data set, or omit it"
            )
        for dataset in self._datasets:
            if self._datasets.count(dataset) > 1:
                raise InputError(f"--dataset {dataset}: given twice; name every data set once")
            # A language model takes the texts of any hub data set.
            paired = (source.reads_images or os.path.isdir(dataset)) and has_pairs(dataset)
            if paired and not source.reads_images:
                raise InputError(
                    f"--dataset {dataset}: holds images with texts, and {options.model} reads no images; give a text "
                    f"file, wikitext2, c4, {SELF} or {BUILTIN} (offline)"
                )
            if not paired and source.is_dual_encoder:
                raise InputError(
                    f"--dataset {dataset}: {options.model} compares images with texts and needs both; give a folder "
                    "with images and captions.jsonl, which has one row with image and text per image"
                )
            (folders if paired else texts).append(dataset)
        return texts, folders

    def _windows(self, requests: list[tuple[str, int]], sample: bool) -> CalibrationSet:
        """The texts of the calibration set.

        Args:
            requests: data sets with their numbers of windows.
            sample: as of `read`.
        """
        if not requests:
            return CalibrationSet(no_windows(self._length))
        tokenizer = load_tokenizer(self._source.folder, self._options.trust_remote_code)
        left_over = -(-HELD_OUT // len(requests))
        parts, warnings, to_sample = [], [], None
        for dataset, count in requests:
            if dataset != SELF:
                windows, warned = self._text(tokenizer, dataset, count, left_over)
                parts.append(windows)
                warnings += warned
                continue
            text = SelfText(self._source, tokenizer, self._machine, self._length, self._options.seed)
            own = total = min(count, text.most)
            if self._dose is not None:
                total += left_over + min(self._fresh(self._dose, own), text.most - own)
            to_sample = None if sample else text.to_sample(total)
            ids = text.sample(total) if to_sample is None else text.stand_in(total)
            parts.append(as_windows(ids[:own], SELF, ids[own:]))
            if own < count:
                parts.append(self._text(tokenizer, BUILTIN, count - own, left_over)[0])
                warnings.append(
                    f"{SELF}: on a CPU this model samples {own} of {count} windows in reasonable time; {BUILTIN} gives "
                    "the others. Text like the model's future input, or a GPU, is better"
                )
        return CalibrationSet(mix_windows(parts), warnings=tuple(warnings), to_sample=to_sample)

    def _fresh(self, dose: Dose, own: int) -> int:
        """Windows to train on beside the `own` calibration windows: those seen several times teach little more."""
        if dose.minutes is not None:
            return math.ceil(FRESH_WINDOWS * dose.minutes)
        fresh = math.ceil(FRESH_SHARE * (dose.tokens or 0) / self._length)
        return min(fresh, own // 2) if dose.by_default else fresh

    def _text(
        self, tokenizer: PreTrainedTokenizerBase, dataset: str, count: int, left_over: int
    ) -> tuple[Windows, list[str]]:
        """Windows of a text and warnings.

        At least `left_over` windows are spare if the text has GENEROUS_WINDOWS, whatever the run does with them, since
        runs of other methods share the calibration. Shorter texts give up windows only if distillation was asked for.
        """
        options = self._options
        documents = read_documents(
            dataset, (count + left_over) * self._length, tokenizer, options.chat_template, options.text_column
        )
        text = tokenize(tokenizer, documents, dataset)
        enough = len(text.ids) >= GENEROUS_WINDOWS * (self._length - len(text.prefix))
        spared = enough or (self._dose is not None and not self._dose.by_default)
        windows = cut_windows(text, count, self._length, options.seed, left_over if spared else 0)
        return windows, check_worth(windows, len(text.prefix))
