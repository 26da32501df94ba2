"""Calibration data that is damaged, and what its readers may make of it.

A reader refuses a damaged file with one line, or makes documents whose every line stands in the file.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

from benchmarks.reliability.mutations import damage_bytes, damage_json, damage_lines
from benchmarks.reliability.targets import Outcome, Target, checkpoint_targets, refusal
from pgsvd_vllm.errors import PgsvdError
from pgsvd_vllm.offline.data.image_text import CAPTIONS, read_pairs
from pgsvd_vllm.offline.data.text import read_documents

# Tokens to read of a data set: all.
ALL = 10**9
# Prints whatever it gets, so that values of wrong types show.
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
MESSAGE = re.compile(r"<\|.*?\|>(.*?)<\|end\|>", re.DOTALL)
LINE_END = re.compile(r"\r\n|\r|\n")
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS: tuple[dict[str, Any], ...] = (
    {"text": "Rivers are long.\nTowns are old."},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Tell."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Parts."}, {"type": "text", "text": "Two."}]}]},
    {"conversations": [{"from": "human", "value": "Which river?"}, {"from": "gpt", "value": "This one."}]},
    {"prompt": "A question, and", "completion": " its answer.", "meta": {"id": 3}},
    {"instruction": "Translate.", "input": "ein Fluss", "output": "a river"},
    {"question": "Why?", "answer": "Because.", "score": 0.5},
    {"chosen": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}], "rejected": "No."},
    {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"content": "A text under another name."},
)
Documents = list[str]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    found.chat_template = TEMPLATE
    return found


def _strings(value: Any) -> Iterator[str]:
    """Every string value in a JSON value, and in JSON that a string holds."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
            try:
                inner = json.loads(one)
            except (ValueError, RecursionError):
                continue
            waiting += [inner] if isinstance(inner, list) else []
        elif isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one


def _lines_of(strings: Iterator[str]) -> set[str]:
    """The lines of strings, halves of surrogate pairs replaced as the reader does."""
    whole = (text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in strings)
    return {"", *(line for text in whole for line in text.split("\n"))}


def _contents(document: str) -> list[str]:
    """The contents of a rendered conversation, or the plain text."""
    contents = MESSAGE.findall(document)
    return contents if contents and not MESSAGE.sub("", document) else [document]


def stands_in(documents: Documents, rows: list[Any]) -> bool:
    """Whether there is one document per row, made of lines of its strings."""
    return len(documents) == len(rows) and all(
        {line for content in _contents(document) for line in content.split("\n")} <= _lines_of(_strings(row))
        for document, row in zip(documents, rows, strict=True)
    )


def rows_of_lines(data: bytes) -> list[Any]:
    """The rows of JSON Lines."""
    lines = LINE_END.split(data.decode("utf-8-sig"))
    return [json.loads(line) for line in lines if line.strip()]


def rows_of_json(data: bytes) -> list[Any]:
    """The rows of a JSON array or of one object, else of JSON Lines."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError:
        return rows_of_lines(data)
    return found if isinstance(found, list) else [found]


def rows_of_table(data: bytes) -> list[Any]:
    """The rows of a CSV file as lists of cells."""
    text = data.decode("utf-8-sig")
    header = LINE_END.split(text)[0]
    delimiter = max(",;|\t", key=header.count)
    found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    return [row for row in found[1:] if row]


class DataFile:
    """A calibration file.

    Args:
        path: of the file.
        rows: its rows, read without the project's reader; None where documents are only checked to be text.
    """

    def __init__(self, path: Path, rows: Callable[[bytes], list[Any]] | None) -> None:
        path.parent.mkdir(parents=True)
        self.path, self.rows, self.tokenizer = path, rows, tokenizer()

    def read(self, data: bytes) -> Outcome:
        """Write the file and read its documents as `compress` does."""
        self.path.write_bytes(data)
        try:
            documents = list(read_documents(str(self.path), ALL, self.tokenizer))
        except PgsvdError as error:
            return refusal(error)
        "".join(documents).encode()  # raises where a document is no text
        if self.rows is None:
            return Outcome.READ
        try:
            same = stands_in(documents, self.rows(data))
        except (ValueError, RecursionError):
            same = False
        return Outcome.READ if same else Outcome.DIFFERENT


class PairFolder:
    """A folder of two images with captions, of which one file is damaged.

    Args:
        folder: that does not exist yet.
        name: of the damaged file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True)
        for number, file in enumerate(("a.png", "b.jpg")):
            Image.effect_noise((9 + number, 8), 60).convert("RGB").save(folder / file)
        rows = [{"image": "a.png", "text": "A red square."}, {"file_name": "b.jpg", "caption": "Noise."}]
        (folder / CAPTIONS).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        self.processor = CLIPProcessor(images, tokenizer())  # type: ignore[no-untyped-call]
        self.folder, self.path = folder, folder / name
        self.sample = self.path.read_bytes()

    def read(self, data: bytes) -> Outcome:
        """Write the file and read the pairs as `compress` does."""
        self.path.write_bytes(data)
        try:
            pairs = read_pairs(str(self.folder), ALL, 0, self.processor, 32)
        except PgsvdError as error:
            return refusal(error)
        finite = all(torch.isfinite(batch["pixel_values"]).all() for batch in pairs.batches)
        return Outcome.READ if finite and pairs.count <= data.count(b"{") + 2 else Outcome.DIFFERENT


def _parquet(folder: Path) -> bytes:
    """A Parquet file of texts and chats."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "sample.parquet"
    chat = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": "Yes."}]
    parquet.write_table(pyarrow.table({"messages": [chat] * 3}), path)
    return path.read_bytes()


def row_targets(folder: Path) -> list[Target]:
    """The targets of calibration data, which write below an empty folder."""
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["question", "answer"], ["Why?", "A line,\nanother."], ['"Who"?', "They."]])
    wanted: list[tuple[str, str, bytes, Callable[[bytes, Random], bytes], Callable[[bytes], list[Any]] | None]] = [
        ("rows of JSON Lines", "rows.jsonl", lines, damage_lines, rows_of_lines),
        ("bytes of JSON Lines", "rows.jsonl", lines, damage_bytes, rows_of_lines),
        ("rows of JSON", "rows.json", json.dumps(ROWS).encode(), _damage_array, rows_of_json),
        ("rows of CSV", "rows.csv", table.getvalue().encode(), damage_bytes, rows_of_table),
        ("rows of Parquet", "rows.parquet", _parquet(folder), damage_bytes, None),
        ("compressed rows", "rows.jsonl.gz", gzip.compress(lines, mtime=0), damage_bytes, None),
        ("plain text", "text.txt", "Prose of ä river.\n".encode() * 9, damage_bytes, None),
    ]
    found = []
    for name, file, sample, damage, rows in wanted:
        found.append(Target(name, sample, damage, DataFile(folder / name.replace(" ", "-") / file, rows).read))
    for name, file, damage in (
        ("captions", CAPTIONS, damage_lines),
        ("PNG image", "a.png", damage_bytes),
        ("JPEG image", "b.jpg", damage_bytes),
    ):
        pairs = PairFolder(folder / name.replace(" ", "-"), file)
        found.append(Target(name, pairs.sample, damage, pairs.read, share=0.1))
    return found


def _damage_array(data: bytes, random: Random) -> bytes:
    """Damage a JSON array of rows."""
    inside = json.dumps({"rows": json.loads(data)}).encode()
    damaged = damage_json(inside, random)
    try:
        rows = json.loads(damaged)
    except (ValueError, RecursionError):
        return damaged
    return json.dumps(rows.get("rows", rows)).encode()


def all_targets(folder: Path) -> list[Target]:
    """Every target of checkpoints and calibration data, each with files of its own below an empty folder."""
    return [*checkpoint_targets(folder / "checkpoints"), *row_targets(folder)]
