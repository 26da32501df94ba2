"""Opens text files: decompresses and decodes them, and names files that hold no text."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pgsvd_vllm.errors import InputError, reason_of

HEAD = 4096
# The longest ones first: UTF-32's mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# First bytes of files that hold no text, and what to say.
NO_TEXT = (
    (re.compile(rb"version https://git-lfs"), "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (re.compile(rb"%PDF-"), "is a PDF document; extract its text, for example with pdftotext"),
    (re.compile(rb"PK(?:\x03\x04|\x05\x06)"), "is a ZIP archive or an office document; give the text in it"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!"), "is a 7z or RAR archive; give the files in it"),
    (re.compile(rb".{257}ustar", re.DOTALL), "is a tar archive; give the files in it"),
)
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
# Control characters that text does not hold; it holds tabs, line ends, form feeds and terminal sequences.
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# What the bytes of an invalid UTF-8 sequence become, see `errors="surrogateescape"`.
NOT_UTF8 = re.compile("[\udc80-\udcff]")


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BytesIO(pyarrow.input_stream(str(path), compression="zstd").read())


COMPRESSED: tuple[tuple[re.Pattern[bytes], Callable[[Path], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9]1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstandard),
)
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except UnicodeError as error:
        raise InputError(f"--dataset {path}: not valid {error.args[0]} text; convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise InputError(f"--dataset {path}: cannot be read ({reason})") from None


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its first bytes are those of gzip, bzip2, xz or Zstandard."""
    opener = _opener(path)
    return path.open("rb") if opener is None else opener(path)


def is_compressed(path: Path) -> bool:
    """Whether the first bytes of a file are those of gzip, bzip2, xz or Zstandard."""
    return _opener(path) is not None


def _opener(path: Path) -> Callable[[Path], Any] | None:
    """The function that opens a compressed file; None for another file."""
    with path.open("rb") as file:
        head = file.read(16)
    return next((opener for magic, opener in COMPRESSED if magic.match(head)), None)


def read_head(path: Path) -> bytes:
    """The first decompressed bytes of a file, at most `HEAD`."""
    with named_errors(path), open_bytes(path) as file:
        return file.read(HEAD)


def check_text(path: Path, head: bytes, html: bool = False) -> None:
    """Refuse a file of a known format that holds no text.

    Args:
        path: of the file.
        head: its first bytes, decompressed.
        html: whether HTML is accepted.

    Raises:
        InputError: says what the file is and what to do.
    """
    for magic, advice in NO_TEXT:
        if magic.match(head):
            raise InputError(f"--dataset {path}: {advice}")
    if HTML.match(head) and not html:
        raise InputError(f"--dataset {path}: is an HTML page, such as the error page of a download; give the text")


def text_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Args:
        path: may be compressed, see `open_bytes`.
        newline: as of `open`; None turns every line end into a line feed.

    Raises:
        InputError: the file cannot be read or holds no text; names the line.
    """
    head = read_head(path)
    check_text(path, head, html=path.suffix.lower() in (".html", ".htm"))
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
    controls = len(CONTROLS.findall(head)) if encoding == "utf-8" else 0
    if controls * 10 > len(head):
        raise InputError(
            f"--dataset {path}: holds NUL bytes or control characters, so it is binary or UTF-16 without a byte-order "
            "mark; give UTF-8 text"
        )
    with (
        named_errors(path),
        open_bytes(path) as file,
        io.TextIOWrapper(file, encoding, "surrogateescape", newline) as stream,
    ):
        for number, line in enumerate(stream, 1):
            bad = None if line.isascii() else NOT_UTF8.search(line)
            if bad:
                advice = (
                    "the file holds control characters as well, so it is binary; give text"
                    if controls
                    else "convert the file, for example with iconv -f latin1 -t utf-8"
                )
                raise InputError(
                    f"--dataset {path}: line {number} is not UTF-8 text (byte 0x{ord(bad[0]) - 0xDC00:02x}); {advice}"
                )
            yield line


def read_text(path: Path) -> str:
    """The whole text of a file; raises InputError as `text_lines`."""
    return "".join(text_lines(path))
