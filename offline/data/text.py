"""Reads calibration text from a file, a hub data set or Python's documentation and cuts it into token windows."""

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
# Characters read from a hub data set per requested token; English has about 4.5.
CHARS_PER_TOKEN = 8
# For chat templates that write the current date.
DATE = datetime(2026, 1, 1)


@dataclass(frozen=True)
class TokenizedText:
    """One text as token ids.

    Attributes:
        ids: int64 [tokens].
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
        others: int64 [any, length], the remaining windows of the text.
    """

    ids: torch.Tensor
    name: str
    sha256: str
    others: torch.Tensor


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: it cannot be loaded or is empty.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises exceptions of many types
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


def read_documents(dataset: str, tokens: int, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[str]:
    """The documents of a data set, at least `tokens` tokens of them if it has so many.

    Args:
        dataset: `python-docs`, `wikitext2`, `c4`, or the path of a .jsonl file whose rows have a
            `text` or chat `messages`, or of a plain text file with any other extension.
        tokens: hub data sets are read only up to this length.
        tokenizer: its chat template formats `messages`.
        chat: format plain text as conversations, see `conversations`.

    Raises:
        InputError: the data set does not exist or cannot be read; the message names an alternative.
    """
    plain = partial(conversations, tokenizer=tokenizer) if chat else list[str]
    if dataset == BUILTIN:
        return plain(builtin_prose())
    if dataset in HUB_SETS:
        return plain(_hub_documents(dataset, tokens * CHARS_PER_TOKEN))
    path = Path(dataset)
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise InputError(
            f"--dataset {dataset}: no such file; known data sets are {BUILTIN} (offline), {', '.join(HUB_SETS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"--dataset {dataset}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--dataset {dataset}: cannot be read ({error.strerror})") from None
    return _jsonl_documents(path, text, tokenizer, plain) if path.suffix == ".jsonl" else plain([text])


def conversations(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Format documents as conversations: each pair of paragraphs is one user and one assistant turn.

    Args:
        documents: plain texts; blank lines separate paragraphs.
        tokenizer: with the model's chat template.

    Raises:
        InputError: the model has no chat template, or the template rejects a user and an assistant turn.
    """
    if not tokenizer.chat_template:
        raise InputError("--chat-template: the model's tokenizer has no chat template; omit it")
    found = []
    for document in documents:
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", document) if part.strip()]
        for number in range(0, len(paragraphs), 2):
            roles = zip(("user", "assistant"), paragraphs[number : number + 2], strict=False)
            messages = [{"role": role, "content": content} for role, content in roles]
            try:
                found.append(_render(messages, tokenizer))
            except Exception as error:  # templates raise exceptions of many types
                raise InputError(f"--chat-template: the template rejected a user/assistant turn ({error})") from None
    return found


def _jsonl_documents(
    path: Path, text: str, tokenizer: PreTrainedTokenizerBase, plain: Callable[[list[str]], list[str]]
) -> list[str]:
    """The documents of a .jsonl file; `plain` formats rows of plain text."""
    documents = []
    # splitlines would also split at U+2028, which may stand inside a JSON string.
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
            documents.append(_render_row(path, number, row["messages"], tokenizer))
        else:
            raise InputError(f'--dataset {path}: line {number} has no "text" or "messages" field')
    return documents


def _render(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One conversation in the model's chat template; a fixed date keeps the text the same on every day."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=DATE.strftime))


def _render_row(path: Path, number: int, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation of one row of a .jsonl file; raises InputError naming the line."""
    if not tokenizer.chat_template:
        raise InputError(f'--dataset {path}: line {number} has "messages", but the model has no chat template')
    try:
        return _render(messages, tokenizer)
    except Exception as error:  # templates raise exceptions of many types
        raise InputError(f"--dataset {path}: line {number}: the model's chat template rejected it ({error})") from None


def _hub_documents(dataset: str, characters: int) -> list[str]:
    """The first documents of a hub data set, at least `characters` long together."""
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
            if size >= characters:
                break
    except Exception as error:  # network, hub and parquet layers raise exceptions of many types
        raise InputError(
            f"--dataset {dataset}: the hub does not provide it ({reason_of(error)}); "
            f"use --dataset {BUILTIN} (offline) or a local text file"
        ) from None
    return ["".join(documents)] if dataset == "wikitext2" else documents


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the special tokens that the tokenizer puts before any text, such as BOS."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str], name: str) -> TokenizedText:
    """Tokenize documents into one sequence, separated by the end-of-text token if there is one.

    Args:
        tokenizer: of the model.
        documents: may be empty.
        name: of the data set.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and len(documents) > 1 else []
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []:
        ids += encoded + separator
    return TokenizedText(torch.tensor(ids, dtype=torch.int64), leading_tokens(tokenizer), name)


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
    """The empty windows [0, length] of a calibration set that has only pairs."""
    return _windows(torch.empty(0, length, dtype=torch.int64), torch.empty(0, length, dtype=torch.int64), "")


def mix_windows(parts: Sequence[Windows]) -> Windows:
    """Combine the windows of several texts, in turn."""
    if len(parts) == 1:
        return parts[0]

    def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of the parts in turn, so that the first rows come from every text."""
        rows = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        return torch.stack(rows) if rows else parts[0]

    name = " + ".join(part.name for part in parts)
    return _windows(interleaved([p.ids for p in parts]), interleaved([p.others for p in parts]), name)


def _windows(ids: torch.Tensor, others: torch.Tensor, name: str) -> Windows:
    return Windows(ids, name, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), others)
