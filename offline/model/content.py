"""The SHA-256 of files by content, so that files that were only moved or touched are the same."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pgsvd_vllm.errors import InputError

_CHUNK = 1 << 20


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names and the bytes of files; raises InputError for a file that cannot be read."""
    ordered = sorted(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_file_digest, ordered))
    return hashlib.sha256(json.dumps([[p.name, d] for p, d in zip(ordered, digests, strict=True)]).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(chunk):
                digest.update(chunk[:count])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
