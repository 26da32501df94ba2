"""Text files in every encoding and compression, and files that hold no text."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.text_file import read_text, text_lines

TEXT = "plain\ntext ü 漢字 \u2028 here\n"


def zstandard(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_marked_encodings_and_line_ends_are_read(tmp_path: Path, encoding: str, line_end: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.replace("\n", line_end).encode(encoding))
    assert read_text(path) == TEXT
    assert list(text_lines(path)) == TEXT.splitlines(keepends=True)[:1] + ["text ü 漢字 \u2028 here\n"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard])
def test_compressed_text_is_read_under_any_name(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "text"
    path.write_bytes(compress(TEXT.encode() * 2000))
    assert read_text(path) == TEXT * 2000
    path.write_bytes(compress(TEXT.encode() * 2000)[:-5])
    with pytest.raises(InputError, match="cannot be read|not a readable") as caught:
        read_text(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"good\ncaf\xe9 latin-1\n", r"line 2 is not UTF-8 text \(byte 0xe9\).*iconv"),
        (b"x\n" * 50_000 + b"\xff\n", "line 50001 is not UTF-8"),
        (b"\xff\xfe\x00", "not valid utf-?16.* text"),
        ("text".encode("utf-16-le"), "NUL bytes.*UTF-16 without a byte-order mark"),
        (b"\0" * 6000, "NUL bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "HTML page"),
        (b"\n  <HTML lang='en'>", "HTML page"),
        (b"%PDF-1.7\n", "PDF document"),
        (b"PK\x03\x04rest", "ZIP archive"),
        (b"PK\x05\x06" + b"\0" * 18, "ZIP archive"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "7z or RAR archive"),
        ("你好世界".encode("utf-16-le") * 500, "control characters, so it is binary or UTF-16"),
        (b"a compressed or compiled file \x01\xff" * 9, r"line 1 is not UTF-8 text .*it is binary; give text"),
        (b"a" * 257 + b"ustar\x0000", "tar archive"),
        (b"\x1f\x8bnot gzip at all", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL bytes|not UTF-8"),
    ],
)
def test_files_without_text_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_text(path)
    assert str(caught.value).startswith(f"--dataset {path}: ")
    assert "\n" not in str(caught.value)


def test_html_is_read_where_the_name_says_so(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<html>text</html>", encoding="utf-8")
    assert read_text(path) == "<html>text</html>"


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.txt: cannot be read \(No such file"):
        read_text(tmp_path / "absent.txt")
