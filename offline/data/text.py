"""Reads calibration text from files, folders, hub data sets or Python's documentation."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.data.chat import conversations, render
from pgsvd_vllm.offline.data.hub_rows import HUB_SETS, hub_rows, is_hub_id
from pgsvd_vllm.offline.data.row_files import ROW_FILES, PlacedRow, read_rows, row_format
from pgsvd_vllm.offline.data.rows import Conversation, RowError, read_row
from pgsvd_vllm.offline.data.text_file import COMPRESSED_SUFFIXES, read_text
from pgsvd_vllm.offline.options import BUILTIN, SELF

# Characters read from a hub data set per requested token; English has about 4.5.
CHARS_PER_TOKEN = 8
# The files of a folder that are read: those of the first kind that it holds.
FOLDER_KINDS = (*ROW_FILES, ".txt", ".md")
# Files that describe a folder's data.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "readme.md")
TAKEN = (
    f"give a text file, a {', '.join(ROW_FILES)} file, a folder of such files, OWNER/NAME, OWNER/NAME:CONFIGURATION or "
    f"OWNER/NAME:CONFIGURATION:SPLIT of a hub data set, {', '.join(HUB_SETS)}, {SELF} or {BUILTIN} (offline)"
)
# No white space, control character, replacement character or character that Unicode calls ignorable, such as
# zero-width characters, soft hyphens, direction marks, variation selectors and tags.
VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U000e0000-\U000e0fff]"
)
# A file or subfolder of the split `train`.
TRAIN = re.compile(r"(?:^|[/\\_.-])train(?:[/\\_.-])", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")

Formatter = Callable[[Iterable[str]], Iterable[str]]


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


def read_documents(
    dataset: str, tokens: int, tokenizer: PreTrainedTokenizerBase, chat: bool = False, column: str | None = None
) -> Iterator[str]:
    """The documents of a data set, at least `tokens` tokens of them if it has so many.

    Args:
        dataset: `python-docs`, `wikitext2`, `c4`, the hub id of a data set, or the path of a file or folder. The
            suffix of a file names its format, see `row_format`; other files are plain text. Rows are read by `read_row`
            and conversations are rendered by `render`.
        tokens: hub data sets are read only up to this length.
        tokenizer: its chat template formats conversations.
        chat: format plain text as conversations, see `conversations`.
        column: the field of a row that holds its text or conversation; None for those that `read_row` knows. Plain text
            and the sets of HUB_SETS have no such field.

    Raises:
        InputError: the data set does not exist, cannot be read or holds white space alone; the message names the file
            and line, or an alternative.
    """
    plain: Formatter = partial(conversations, tokenizer=tokenizer) if chat else iter
    visible = False
    reader = _Reader(tokenizer, plain, column)
    for document in _documents(dataset, tokens, reader):
        if not document.isascii() and SURROGATE.search(document):
            # JSON may hold halves of surrogate pairs, which no tokenizer takes.
            document = document.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        visible = visible or VISIBLE.search(document) is not None
        yield document
    if not visible:
        raise InputError(f"--dataset {dataset}: holds no text, only white space or control characters; give text")


@dataclass(frozen=True)
class _Reader:
    """Reads rows and plain texts.

    Attributes:
        tokenizer: its chat template formats conversations.
        plain: formats plain text.
        column: of a row's text, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    plain: Formatter
    column: str | None

    def of_rows(self, source: str, rows: Iterator[PlacedRow]) -> Iterator[str]:
        """The documents of rows; raises InputError naming the source and the row."""
        for place, row in rows:
            try:
                document = read_row(row, self.column)
                if isinstance(document, Conversation):
                    texts: Iterable[str] = [render(document, self.tokenizer)]
                else:
                    texts = self.plain([document])
            except RowError as error:
                raise InputError(f"--dataset {source}: {place}: {error}") from None
            yield from texts


def _documents(dataset: str, tokens: int, reader: _Reader) -> Iterator[str]:
    """The documents of a data set, as they are."""
    if dataset == BUILTIN:
        yield from reader.plain(builtin_prose())
    elif dataset in HUB_SETS or is_hub_id(dataset):
        known = replace(reader, column=None) if dataset in HUB_SETS else reader
        documents = known.of_rows(dataset, hub_rows(dataset, TAKEN))
        found = _leading(documents, tokens * CHARS_PER_TOKEN)
        yield from ["".join(found)] if dataset == "wikitext2" else found
    elif os.path.isdir(dataset) or os.path.isfile(dataset):  # unlike Path.is_file, also for a name that is too long
        for path in _files(Path(dataset)) if os.path.isdir(dataset) else [Path(dataset)]:
            kind = row_format(path, reader.column)
            if kind is None:
                yield from reader.plain([read_text(path)])
            else:
                yield from reader.of_rows(str(path), read_rows(path, kind, reader.column))
    elif os.path.exists(dataset):
        raise InputError(f"--dataset {dataset}: is no file or folder, but a pipe or a device; save its text in a file")
    else:
        raise InputError(f"--dataset {dataset}: no such file; {TAKEN}")


def _leading(documents: Iterator[str], characters: int) -> Iterator[str]:
    """The first documents, at least `characters` long together."""
    size = 0
    for document in documents:
        yield document
        size += len(document)
        if size >= characters:
            return


def _files(folder: Path) -> list[Path]:
    """The data files of a folder and its subfolders, by name: of one format, and for training if some are named so."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name.lower() not in DESCRIPTIONS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    for kind in FOLDER_KINDS:
        names = (kind, *(kind + suffix for suffix in COMPRESSED_SUFFIXES))
        files = [path for path in found if path.name.lower().endswith(names)]
        splits = [path for path in files if TRAIN.search(str(path.relative_to(folder)))]
        if files:
            return splits if splits and kind in ROW_FILES else files
    raise InputError(f"--dataset {folder}: no such file in this folder: {TAKEN}")
