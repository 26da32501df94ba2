"""Calibration text: from a file, a known data set or Python's own documentation to token windows."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.options import BUILTIN

HUB_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "c4": ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz"),
}
# Read no more of a hub set than this many characters per wanted token: English has about 4.5.
CHARS_PER_TOKEN = 8
# In chat templates that want one.
DATE = datetime(2026, 1, 1)


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids.

    Attributes:
        ids: int64 [n].
        prefix: tokens that start every window, such as BOS.
        name: where the text came from.
    """

    ids: torch.Tensor
    prefix: list[int]
    name: str


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, cut from one text.

    Attributes:
        ids: int64 [windows, length], to calibrate on.
        name: where the text came from.
        sha256: of the token ids.
        others: int64 [any, length], the text's remaining windows.

    Both in drawn order: the first ones of either are from all over the text.
    """

    ids: torch.Tensor
    name: str
    sha256: str
    others: torch.Tensor


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: none can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise InputError(
            f"{folder}: no usable tokenizer ({reason_of(error)}); put tokenizer.json beside config.json"
        ) from None
    if not len(tokenizer):
        raise InputError(f"{folder}: the tokenizer is empty; put tokenizer.json beside config.json")
    return tokenizer


def builtin_prose() -> Iterator[str]:
    """English prose that ships with Python: the language reference that `help()` prints."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def read_documents(
    dataset: str, wanted_tokens: int, tokenizer: PreTrainedTokenizerBase, chat: bool = False
) -> list[str]:
    """The documents of a data set, enough for `wanted_tokens`.

    Args:
        dataset: `python-docs`, `wikitext2`, `c4`, or the path of a .jsonl file whose rows have a
            `text` or chat `messages`, or of a plain text file of any other extension.
        tokenizer: renders `messages` through the model's chat template.
        wanted_tokens: hub sets are read only this far.
        chat: make conversations of plain text, see `conversations`.

    Raises:
        InputError: no such file or set, or it cannot be read; names what to give instead.
    """
    plain = partial(conversations, tokenizer=tokenizer) if chat else list[str]
    if dataset == BUILTIN:
        return plain(builtin_prose())
    if dataset in HUB_SETS:
        return plain(_hub_documents(dataset, wanted_tokens * CHARS_PER_TOKEN))
    path = Path(dataset)
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise InputError(
            f"--dataset {dataset}: no such file; known sets are {BUILTIN} (offline), {', '.join(HUB_SETS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"--dataset {dataset}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--dataset {dataset}: cannot be read ({error.strerror})") from None
    return _jsonl_documents(path, text, tokenizer, plain) if path.suffix == ".jsonl" else plain([text])


def conversations(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Documents as conversations in the model's chat template: what one paragraph asks the next one answers.

    Raises:
        InputError: the model has no chat template, or it refuses such a conversation.
    """
    if not tokenizer.chat_template:
        raise InputError("--chat-template: the model's tokenizer has none; leave it out")
    found = []
    for document in documents:
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", document) if part.strip()]
        for number in range(0, len(paragraphs), 2):
            roles = zip(("user", "assistant"), paragraphs[number : number + 2], strict=False)
            messages = [{"role": role, "content": content} for role, content in roles]
            try:
                found.append(_render(messages, tokenizer))
            except Exception as error:  # templates raise what they like
                raise InputError(f"--chat-template: the model's refuses a question and its answer ({error})") from None
    return found


def _jsonl_documents(
    path: Path, text: str, tokenizer: PreTrainedTokenizerBase, plain: Callable[[list[str]], list[str]]
) -> list[str]:
    documents = []
    # Not splitlines: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"--dataset {path}: line {number} is not JSON") from None
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            documents += plain([row["text"]])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            documents.append(_rendered(path, number, row["messages"], tokenizer))
        else:
            raise InputError(f'--dataset {path}: line {number} has no "text" or "messages" field')
    return documents


def _render(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    # Some templates write the date: the same text must not be another one tomorrow.
    return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=DATE.strftime))


def _rendered(path: Path, number: int, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise InputError(f'--dataset {path}: line {number} has "messages", but the model has no chat template')
    try:
        return _render(messages, tokenizer)
    except Exception as error:  # templates raise what they like
        raise InputError(f"--dataset {path}: line {number}: the model's chat template refuses it ({error})") from None


def _hub_documents(dataset: str, wanted_chars: int) -> list[str]:
    from datasets import load_dataset

    repo, config, data_file = HUB_SETS[dataset]
    options: dict[str, Any] = {"data_files": {"train": data_file}} if data_file else {}
    try:
        rows = load_dataset(repo, config, split="train", streaming=True, **options)
        documents: list[str] = []
        size = 0
        for row in rows:
            documents.append(row["text"])
            size += len(row["text"])
            if size >= wanted_chars:
                break
    except Exception as error:  # network, hub and parquet layers each raise their own kinds
        raise InputError(
            f"--dataset {dataset}: the hub does not provide it here ({reason_of(error)}); "
            f"use --dataset {BUILTIN} (offline) or a local text file"
        ) from None
    return ["".join(documents)] if dataset == "wikitext2" else documents


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer puts before any text (BOS where the model was trained so)."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str], name: str) -> TokenizedText:
    """All documents as one stream of tokens, separated by the end-of-text token where there is one."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and len(documents) > 1 else []
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []:
        ids += encoded + separator
    return TokenizedText(torch.tensor(ids, dtype=torch.int64), leading_tokens(tokenizer), name)


def cut_windows(text: TokenizedText, count: int, length: int, seed: int, spare: int = 0) -> Windows:
    """Draw `count` windows that do not overlap; fewer where the text is short.

    Args:
        text: to draw from.
        count: windows wanted.
        length: tokens of a window, the prefix included.
        seed: of the draw.
        spare: windows that must be left over.

    Raises:
        InputError: the text does not fill one window and the spare ones.
    """
    body = length - len(text.prefix)
    available = len(text.ids) // body
    if available < 1 + spare:
        raise InputError(
            f"--dataset {text.name}: {len(text.ids)} tokens are too little calibration text: {1 + spare} x "
            f"--max-seq-length {length} needs {(1 + spare) * body}; give more text or a smaller --max-seq-length"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(count, available - spare)
    prefix = torch.tensor(text.prefix, dtype=torch.int64)

    def windows(chosen: list[int]) -> torch.Tensor:
        rows = [torch.cat([prefix, text.ids[i * body : (i + 1) * body]]) for i in chosen]
        return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)

    return _windows(windows(order[:count]), windows(order[count:]), text.name)


def no_windows(length: int) -> Windows:
    """Of a calibration without text alone."""
    return _windows(torch.empty(0, length, dtype=torch.int64), torch.empty(0, length, dtype=torch.int64), "")


def mix_windows(parts: Sequence[Windows]) -> Windows:
    """The windows of several texts as those of one."""
    if len(parts) == 1:
        return parts[0]

    def in_turns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """So that the first ones hold some of every text."""
        rows = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        return torch.stack(rows) if rows else parts[0]

    name = " + ".join(part.name for part in parts)
    return _windows(in_turns([part.ids for part in parts]), in_turns([part.others for part in parts]), name)


def _windows(ids: torch.Tensor, others: torch.Tensor, name: str) -> Windows:
    return Windows(ids, name, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), others)
