"""Rows of JSON Lines, JSON, CSV, Parquet and Arrow files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.row_files import read_rows, row_format

ROWS = [{"text": "one", "id": 1}, {"text": 'two\nlines, "quoted"', "id": 2}, {"text": "ünï 漢字 \u2028 \x85", "id": 3}]


def rows_of(path: Path) -> list[Any]:
    kind = row_format(path)
    assert kind is not None
    return list(read_rows(path, kind))


def refused(path: Path, content: bytes, *culprits: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        rows_of(path)
    message = str(caught.value)
    assert message.startswith(f"--dataset {path}: ")
    assert "\n" not in message
    for culprit in culprits:
        assert culprit in message


@pytest.mark.parametrize("name", ["data.jsonl", "data.JSONL", "data.ndjson", "data.json", "data.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_read(tmp_path: Path, name: str, mark: bytes) -> None:
    path = tmp_path / name
    text = "\r\n".join(json.dumps(row, ensure_ascii=row["id"] == 1) for row in ROWS)
    data = mark + text.encode() + b"\n\n  \n"
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(path) == [(f"line {i}", row) for i, row in enumerate(ROWS, 1)]


def test_json_arrays_and_objects_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.Json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    assert rows_of(path) == [(f"row {i}", row) for i, row in enumerate(ROWS, 1)]
    path.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert rows_of(path) == [("row 1", ROWS[0])]


@pytest.mark.parametrize(
    ("name", "content", "culprits"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ("line 2 is not JSON",)),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', ("line 3 is not JSON", "the file may be cut off")),
        ("a.jsonl", b"[" * 100_000, ("line 1 is not JSON",)),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', ("line 1 is not UTF-8",)),
        ("a.jsonl", b"{}\n<html>\n", ("line 2 is not JSON",)),
        ("a.jsonl", b"<!doctype html>", ("HTML page",)),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ("a.json", b'[{"text": "a"},\n{"text": }]', ("line 2 is not JSON",)),
        ("a.json", b'{"text": "a"}\n{"text": "b"', ("line 2 is not JSON",)),
        ("a.json", b"", ("line 1 is not JSON",)),
        ("a.csv", b"body,id\na,1\n", ("line 1 names no known column", "body,id", '"text"')),
        ("a.csv", b"", ("line 1 names no known column",)),
        ("a.csv", b"text,id,text\na,1,b\n", ("line 1 names the column 'text' twice",)),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), ("is a compressed .parquet file; decompress it",)),
        ("a.csv", b"text,id\na,1\nb,2,3\n", ("line 3 has 3 columns, the header 2",)),
        ("a.csv", b'text,id\n"a,1\n', ("is not CSV",)),
        ("a.csv", b"text,id\ncaf\xe9,1\n", ("line 2 is not UTF-8",)),
        ("a.parquet", b"PAR1 but no more", ("not a readable .parquet file",)),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ("a.arrow", b"nothing", ("not a readable .arrow file",)),
    ],
)
def test_damaged_row_files_are_named(tmp_path: Path, name: str, content: bytes, culprits: tuple[str, ...]) -> None:
    refused(tmp_path / name, content, *culprits)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.CSV", ";"), ("a.tsv", "\t")])
def test_tables_are_read(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    text = f'\ufeffid{delimiter}text\r\n1{delimiter}"a, ""b""\nc"\r\n\r\n2{delimiter}d\r\n'
    path.write_bytes(text.encode())
    assert rows_of(path) == [("line 3", {"id": "1", "text": 'a, "b"\nc'}), ("line 5", {"id": "2", "text": "d"})]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a" * 300_000, encoding="utf-8")
    assert rows_of(path) == [("line 2", {"text": "a" * 300_000})]


def test_parquet_and_arrow_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "messages": [{"role": "user", "content": "Q"}], "id": i} for i in range(150)]
    table = pyarrow.Table.from_pylist(rows)
    wanted = [(f"row {row['id'] + 1}", {k: row[k] for k in ("text", "messages")}) for row in rows]
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "without_suffix")
    for make, name in ((pyarrow.ipc.new_stream, "stream.arrow"), (pyarrow.ipc.new_file, "file.arrow")):
        with make(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "without_suffix", "stream.arrow", "file.arrow"):
        assert rows_of(tmp_path / name) == wanted
    parquet.write_table(table.select(["id"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='a.parquet: has the columns id; a row needs "text"'):
        rows_of(tmp_path / "a.parquet")


def test_the_column_of_the_text_is_named(tmp_path: Path) -> None:
    rows = [{"body": f"text {i}", "text": "other"} for i in range(3)]
    wanted = [{"body": row["body"]} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    (tmp_path / "a.csv").write_text("body;text\n" + "".join(f"{r['body']};other\n" for r in rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.txt", "a.csv", "a.parquet"):
        kind = row_format(tmp_path / name, "body")
        assert kind is not None
        found = [row for _, row in read_rows(tmp_path / name, kind, "body")]
        assert [{"body": row["body"]} for row in found] == wanted
    with pytest.raises(InputError, match=r"a.csv: line 1 names no column 'title' \('body;text'\)"):
        list(read_rows(tmp_path / "a.csv", ".csv", "title"))
    with pytest.raises(InputError, match=r"a.parquet: has the columns body, text; a row needs .* `text_column` names"):
        list(read_rows(tmp_path / "a.parquet", ".parquet", "title"))


def test_json_lines_are_recognized_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")
    assert [row for _, row in rows_of(path)] == ROWS
    for text in ('{"unknown": "field"}\n', "{\n  int x;\n}\n", '{"text": "a"} and more\n', "{" * 100_000):
        path.write_text(text, encoding="utf-8")
        assert row_format(path) is None


def test_other_names_are_plain_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a", "a.txt.gz"):
        path = tmp_path / name
        path.write_text("plain", encoding="utf-8")
        assert row_format(path) is None
