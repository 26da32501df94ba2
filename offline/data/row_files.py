"""Reads the rows of JSON Lines, JSON, CSV, Parquet and Arrow files."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.data.rows import TAKEN, known_fields, read_row
from pgsvd_vllm.offline.data.text_file import (
    COMPRESSED_SUFFIXES,
    check_text,
    is_compressed,
    named_errors,
    read_head,
    read_text,
    text_lines,
)

# A place in the file for error messages, such as `line 3`, and a row.
PlacedRow = tuple[str, Any]

ROWS_PER_BATCH = 64
DELIMITERS = (",", "\t", ";", "|")
LONGEST_CELL = 2**31 - 1


def _json_line_rows(path: Path, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of JSON Lines; empty lines are skipped."""
    # str.splitlines would also split at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                cut = "" if line.endswith("\n") else "; it is the last line, the file may be cut off"
                reason = reason_of(error)
                raise InputError(f"--dataset {path}: line {number} is not JSON ({reason}){cut}") from None
            yield f"line {number}", row


def _json_rows(path: Path, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a JSON file: those of its array, its one object, or those of JSON Lines."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_line_rows(path)
            return
        line = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"--dataset {path}: {line}is not JSON ({reason_of(error)})") from None
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield f"row {number}", row


def _table_rows(path: Path, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a CSV file with a header; the delimiter is the one that separates known columns in the header."""
    csv.field_size_limit(LONGEST_CELL)
    with named_errors(path):
        header = next(text_lines(path), "")
    delimiters = [d for d in DELIMITERS if known_fields(next(csv.reader([header], delimiter=d), []), column)]
    if not delimiters:
        known = "known column" if column is None else f"column {column!r}"
        raise InputError(f"--dataset {path}: line 1 names no {known} ({header.strip()[:80]!r}); {TAKEN}")
    delimiter = max(delimiters, key=header.count)
    reader = csv.reader(text_lines(path, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader)
        for name in known_fields(names, column):
            if names.count(name) > 1:
                raise InputError(f"--dataset {path}: line 1 names the column {name!r} twice; rename one of them")
        for cells in reader:
            if cells and len(cells) != len(names):
                raise InputError(
                    f"--dataset {path}: line {reader.line_num} has {len(cells)} columns, the header {len(names)}; "
                    f"quote cells that hold {delimiter!r}"
                )
            if cells:
                yield f"line {reader.line_num}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"--dataset {path}: line {reader.line_num} is not CSV ({error})") from None


def _parquet_rows(path: Path, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a Parquet file."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    columns = _known_columns(path, file.schema_arrow.names, column)
    batches = file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns)
    yield from _numbered(row for batch in batches for row in batch.to_pylist())


def _arrow_rows(path: Path, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of an Arrow file or stream, such as `save_to_disk` of the datasets library writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        is_file = read_head(path).startswith(b"ARROW1")
        table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
        table = table.select(_known_columns(path, table.schema.names, column))
        batches = table.to_batches(max_chunksize=ROWS_PER_BATCH)
        yield from _numbered(row for batch in batches for row in batch.to_pylist())


def _known_columns(path: Path, names: list[str], column: str | None) -> list[str]:
    """The columns that `read_row` may read; raises InputError without any."""
    known = known_fields(names, column)
    if not known:
        raise InputError(f"--dataset {path}: has the columns {', '.join(names)[:200]}; {TAKEN}")
    return known


def _numbered(rows: Iterator[Any]) -> Iterator[PlacedRow]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


ROW_FILES: dict[str, Callable[[Path, str | None], Iterator[PlacedRow]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".json": _json_rows,
}
BINARY = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}


def row_format(path: Path, column: str | None = None) -> str | None:
    """The key of `ROW_FILES` for a file; None for plain text.

    The suffix decides, in upper or lower case and before one of a compression. Under other names the beginning tells
    Parquet, Arrow and JSON Lines from plain text.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in ROW_FILES:
        return suffix
    head = read_head(path)
    if head.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"{") and _begins_with_a_row(path, column):
        return ".jsonl"
    return next((name for magic, name in BINARY.items() if head.startswith(magic)), None)


def _begins_with_a_row(path: Path, column: str | None) -> bool:
    """Whether the first line of a text that is not empty is a row; with a column that any object in JSON is."""
    try:
        row = json.loads(next(line for line in text_lines(path) if line.strip()))
        if column is None:
            read_row(row)
    except (ValueError, RecursionError):
        return False
    return True


def read_rows(path: Path, kind: str, column: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a file with their places.

    Args:
        path: of the file.
        kind: as of `row_format`.
        column: the only one that is read; None for those that `read_row` knows.

    Raises:
        InputError: the file cannot be read; names the line where there is one.
    """
    try:
        with named_errors(path):
            if kind in BINARY.values():
                check_text(path, read_head(path))
                if is_compressed(path):
                    raise InputError(f"--dataset {path}: is a compressed {kind} file; decompress it")
            yield from ROW_FILES[kind](path, column)
    except ImportError:
        raise InputError(f"--dataset {path}: reading {kind} files needs pyarrow; pip install pyarrow") from None
    except InputError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types
        raise InputError(f"--dataset {path}: not a readable {kind} file ({reason_of(error)})") from None
