"""Files of finished work: written durably, sealed with checksums, and read only if they are intact."""

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.writer import save_tensors

# Keys of the safetensors metadata: JSON of the caller, SHA-256 of every tensor, and SHA-256 over both and the label.
CONTENT, DIGESTS, SEAL = "content", "sha256", "seal"
# Ending of a file that is being written; such a file is never read.
WRITING = ".writing"


class DamagedFileError(Exception):
    """A work file does not hold what was written under its name; the message says what differs."""


class WorkFileError(InputError):
    """A work file is damaged or misplaced; the other finished work is intact."""


def save_sealed(path: Path, label: str, tensors: dict[str, torch.Tensor], content: object = None) -> None:
    """Write tensors so that the file appears complete or not at all, also after a power cut.

    Args:
        path: of the file.
        label: what the file is; only a reader that expects this label accepts it.
        tensors: name -> tensor, on any device.
        content: JSON value stored beside them.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        CONTENT: json.dumps(content),
        DIGESTS: json.dumps(_digests(stored), sort_keys=True),
    }
    part = path.with_name(path.name + WRITING)
    try:
        save_tensors(stored, part, metadata | {SEAL: _seal(label, metadata)})
        replace_durably(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_sealed(path: Path, label: str, kinds: Collection[str]) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
    """Read the tensors named `kind:name`, and the JSON value beside them.

    Args:
        path: of the file.
        label: that it was saved with.
        kinds: to read; tensors of other kinds are skipped.

    Returns:
        kind -> name -> tensor on the CPU, and the JSON value.

    Raises:
        DamagedFileError: a checksum differs, or the file is something else.
        WorkFileError: the path is no file.
        OSError: the file cannot be read.
    """
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    with _opened(path, label) as (file, digests, content):
        tensors = {key: _tensor(file, key) for key in sorted(digests) if key.partition(":")[0] in found}
    _compare(tensors, digests)
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        found[kind][name] = tensor
    return found, content


def check_sealed(path: Path, label: str) -> None:
    """Compare every tensor of a file with its checksum; raises as `read_sealed`."""
    with _opened(path, label) as (file, digests, _):
        for key in digests:
            _compare({key: _tensor(file, key)}, digests)


@contextmanager
def _opened(path: Path, label: str) -> Iterator[tuple[Any, dict[str, str], Any]]:
    """The open file, the digests of its tensors and its JSON value, once its seal is verified."""
    check_regular(path)
    with path.open("rb"):
        pass  # safetensors calls every failure to open a missing file
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sealed = {key: metadata.get(key, "") for key in (CONTENT, DIGESTS)}
            if metadata.get(SEAL) != _seal(label, sealed):
                raise DamagedFileError("it was written by another run, or its header has changed")
            digests = json.loads(sealed[DIGESTS])
            if set(file.keys()) != digests.keys():
                raise DamagedFileError("a tensor is missing")
            yield file, digests, json.loads(sealed[CONTENT])
    # Not TypeError: Ctrl-C inside the compiled reader raises it, without any damage.
    except SafetensorError as error:
        raise DamagedFileError(str(error)) from None


def _tensor(file: Any, key: str) -> torch.Tensor:
    """A tensor of an open file; raises DamagedFileError if torch refuses its shape or dtype."""
    try:
        tensor: torch.Tensor = file.get_tensor(key)
    except (RuntimeError, AttributeError) as error:
        raise DamagedFileError(f"{key}: {error}") from None
    return tensor


def _compare(tensors: dict[str, torch.Tensor], digests: dict[str, str]) -> None:
    """Raise DamagedFileError for a tensor whose SHA-256 differs."""
    for key, digest in _digests(tensors).items():
        if digest != digests[key]:
            raise DamagedFileError(f"{key} differs from its checksum")


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The SHA-256 of every tensor, on all cores."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(tensors, threads.map(_digest, tensors.values()), strict=True))


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the dtype, the shape and the bytes of a contiguous tensor on the CPU."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(label: str, metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([label, metadata[CONTENT], metadata[DIGESTS]]).encode()).hexdigest()


def check_regular(path: Path) -> None:
    """Refuse a folder, pipe or device in the place of a work file; raises WorkFileError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise WorkFileError(f"{path}: is in the place of a file of this run; remove it and repeat with --resume")


def replace_durably(part: Path, path: Path) -> None:
    """Rename a written file; content and name are on the disk when this returns.

    Args:
        part: the file under its temporary name.
        path: its name in the same folder.
    """
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
