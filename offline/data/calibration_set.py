"""The calibration data that a request names: windows of text, images with texts, or both."""

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.image_text import Pairs, has_pairs, load_processor, mix_pairs, read_pairs
from pgsvd_vllm.offline.data.text import (
    Windows,
    cut_windows,
    leading_tokens,
    load_tokenizer,
    mix_windows,
    no_windows,
    read_documents,
    tokenize,
)
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import BUILTIN, HELD_OUT, PAIRS, WINDOWS, CompressOptions


def read_data(options: CompressOptions, source: ModelSource) -> tuple[Windows, Pairs | None]:
    """The calibration data: an equal share from every data set."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None) or options.max_seq_length
    length = min(options.max_seq_length, limit)
    texts = [dataset for dataset in options.dataset if not has_pairs(dataset)]
    folders = [dataset for dataset in options.dataset if has_pairs(dataset)]
    if folders and not source.sees:
        raise InputError(
            f"--dataset {folders[0]}: no such file, and {options.model} reads no images; give a text file, wikitext2, "
            f"c4 or {BUILTIN} (offline)"
        )
    if texts and source.compares:
        raise InputError(
            f"--dataset {texts[0]}: {options.model} compares images with texts, and needs both; give a folder with "
            "images and captions.jsonl, a row with image and text for each"
        )
    wanted = options.num_calibration_samples or (PAIRS if source.compares else WINDOWS)
    counts = {dataset: len(range(i, wanted, len(options.dataset))) for i, dataset in enumerate(options.dataset)}
    windows = _windows(options, source, length, [(dataset, max(1, counts[dataset])) for dataset in texts])
    if not folders:
        return windows, None
    processor = load_processor(source.folder, options.trust_remote_code)
    longest = source.config.get_text_config().max_position_embeddings if source.compares else None
    parts = [read_pairs(f, max(1, counts[f]), options.seed, processor, longest) for f in folders]
    return windows, mix_pairs(parts)


def _windows(options: CompressOptions, source: ModelSource, length: int, wanted: list[tuple[str, int]]) -> Windows:
    """The calibration windows of some texts, so many of each."""
    if not wanted:
        return no_windows(length)
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    spare = 0 if options.refine is None else HELD_OUT
    parts = []
    for dataset, count in wanted:
        left_over = -(-spare // len(wanted))
        tokens = tokenize(
            tokenizer, read_documents(dataset, (count + left_over) * length, tokenizer, options.chat_template)
        )
        parts.append(cut_windows(tokens, leading_tokens(tokenizer), count, length, options.seed, dataset, left_over))
    return mix_windows(parts)
