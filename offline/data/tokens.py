"""Tokenizes documents piece by piece and cuts the tokens into windows."""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.options import HELD_OUT

# Characters that are tokenized at once; a tokenizer's working memory is 50 to 300 times as many bytes.
PIECE = 1 << 17
# Characters that two pieces of one document share.
OVERLAP = 4096


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids.

    Attributes:
        ids: int32 [tokens].
        prefix: special tokens that start every window, such as BOS.
        name: of the data set.
    """

    ids: torch.Tensor
    prefix: list[int]
    name: str


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, drawn from a text in random order.

    Attributes:
        ids: int64 [windows, length], the calibration windows.
        name: of the data set.
        sha256: of `ids`.
        others: int32 [any, length], the remaining windows of the text.
    """

    ids: torch.Tensor
    name: str
    sha256: str
    others: torch.Tensor

    @property
    def trained(self) -> int:
        """Tokens of a pass of knowledge distillation: all windows but HELD_OUT of the remaining ones."""
        return self.ids.numel() + self.others[HELD_OUT:].numel()


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the special tokens that the tokenizer puts before any text, such as BOS."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], name: str) -> TokenizedText:
    """Tokenize documents into one sequence; if there are several, the end-of-text token follows each.

    Args:
        tokenizer: of the model; without an end-of-text token nothing separates the documents.
        documents: may be empty; only `PIECE` characters of them are in work at a time.
        name: of the data set.

    Raises:
        InputError: the tokenizer fails.
    """
    ids, count = array("i"), 0
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(documents):
        long = len(batch) == 1 and len(batch[0]) > PIECE and tokenizer.is_fast
        try:
            encoded = (
                [_tokens_of_pieces(tokenizer, batch[0])]
                if long
                else tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            )
        except Exception as error:  # tokenizers raise exceptions of many types
            raise _cannot_encode(name, error) from None
        for tokens in encoded:
            ids.extend(separator if count else [])
            ids.extend(tokens)
            count += 1
    ids.extend(separator if count > 1 else [])
    try:
        prefix = leading_tokens(tokenizer)
    except Exception as error:
        raise _cannot_encode(name, error) from None
    return TokenizedText(torch.from_numpy(np.array(ids, dtype=np.int32)), prefix, name)


def _cannot_encode(name: str, error: Exception) -> InputError:
    """The error of a tokenizer that was loaded but does not work."""
    return InputError(
        f"--dataset {name}: the model's tokenizer cannot encode it ({reason_of(error)}); check tokenizer.json and "
        "tokenizer_config.json of the model"
    )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in order, about `PIECE` characters at a time; a longer document is alone."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and size + len(document) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document) + 1
    if batch:
        yield batch


def _tokens_of_pieces(tokenizer: PreTrainedTokenizerBase, document: str) -> "array[int]":
    """The tokens of a long document.

    Neighbouring pieces overlap and are joined in the middle of the overlap. A token depends on the text around it
    alone, so both pieces have the same tokens there, those of the whole document.
    """

    ids = array("i")
    starts = range(0, max(1, len(document) - OVERLAP), PIECE)
    for start in starts:
        piece = document[start : start + PIECE + OVERLAP]
        encoded = tokenizer(piece, add_special_tokens=False, verbose=False).encodings[0]
        first = 0 if start == starts[0] else _first_token(encoded, OVERLAP // 2)
        end = len(encoded) if start == starts[-1] else _first_token(encoded, PIECE + OVERLAP // 2)
        ids.extend(encoded.ids[first:end])
        del encoded  # before the next one is made
    return ids


def _first_token(encoded: Encoding, position: int) -> int:
    """The index of the first token that starts at or after a character."""

    def start(token: int) -> int:
        span = encoded.token_to_chars(token)
        return span[0] if span else 0

    return bisect_left(range(len(encoded)), position, key=start)


def window_length(config: PretrainedConfig, wanted: int) -> int:
    """The tokens of a window for a model of a configuration: as many as wanted, or as it has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet's -1 means any length.
    return min(wanted, limit) if limit and limit > 0 else wanted


def cut_windows(text: TokenizedText, count: int, length: int, seed: int, spare: int = 0) -> Windows:
    """Draw `count` windows that do not overlap; fewer if the text is short.

    Args:
        text: to draw from.
        count: number of calibration windows.
        length: tokens per window, the prefix included.
        seed: of the draw.
        spare: least number of windows that remain in `Windows.others`.

    Raises:
        InputError: the text is shorter than one window and the spare ones.
    """
    body = length - len(text.prefix)
    available = len(text.ids) // body if body > 0 else 0
    if available < 1 + spare:
        raise InputError(
            f"--dataset {text.name}: {len(text.ids)} tokens are too little calibration text: {1 + spare} x "
            f"--max-seq-length {length} needs {(1 + spare) * body}; give more text or a smaller --max-seq-length"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    count = min(count, available - spare)
    bodies = text.ids[: available * body].view(available, body)
    prefix = torch.tensor(text.prefix, dtype=torch.int32)

    def windows(chosen: torch.Tensor) -> torch.Tensor:
        return torch.cat([prefix.expand(len(chosen), -1), bodies[chosen]], dim=1)

    return as_windows(windows(order[:count]), text.name, windows(order[count:]))


def no_windows(length: int) -> Windows:
    """The empty windows [0, length] of a calibration set that has only pairs."""
    none = torch.empty(0, length, dtype=torch.int32)
    return as_windows(none, "", none)


def mix_windows(parts: Sequence[Windows]) -> Windows:
    """Combine the windows of several texts, in turn."""
    if len(parts) == 1:
        return parts[0]

    def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of the parts in turn, so that the first rows come from every text."""
        rows = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        return torch.stack(rows) if rows else parts[0]

    name = " + ".join(part.name for part in parts)
    return as_windows(interleaved([p.ids for p in parts]), name, interleaved([p.others for p in parts]))


def as_windows(ids: torch.Tensor, name: str, others: torch.Tensor) -> Windows:
    """Windows [count, length] of a data set, and its remaining ones [any, length]."""
    ids = ids.long()
    return Windows(ids, name, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), others.int())
