"""SHA-256 checksums of the weight files, in the index's metadata: `"sha256": {file name: hex digits}`."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import CheckpointError

KEY = "sha256"
# A disk is as fast as about this many cores hash.
_MOST_THREADS = 4
_HEX = re.compile(r"[0-9a-f]{64}")


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def recorded_sums(index: Mapping[str, Any], files: Iterable[str], where: Path) -> dict[str, str] | None:
    """The checksums of an index by file name; None if it records none, as those of version 0.1.0.

    Args:
        index: as read.
        files: names of its weight files.
        where: the index, for errors.

    Raises:
        CheckpointError: a checksum is malformed or missing.
    """
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or KEY not in metadata:
        return None
    sums = metadata[KEY]
    for name in files:
        if not isinstance(sums, dict) or not isinstance(sums.get(name), str) or not _HEX.fullmatch(sums[name]):
            raise CheckpointError(f"{where}: metadata.{KEY} has no checksum of {name}")
    return sums


def check_sum(path: Path, found: str, recorded: str) -> None:
    """Compare a file's checksum with the recorded one; raises CheckpointError if they differ."""
    if found != recorded:
        raise CheckpointError(
            f"{path}: damaged, its SHA-256 is {found[:16]}..., recorded is {recorded[:16]}...; copy the file again"
        )


def for_each_file(paths: Iterable[Path], check: Callable[[Path], None]) -> None:
    """Call a function for each file, several at a time; raises the first file's error."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(check, paths))
