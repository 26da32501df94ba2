"""Reads a weight file once, from beginning to end: its values and its checksum."""

import hashlib
import io
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.checksums import check_sum
from pgsvd_vllm.format.dtypes import bytes_are_finite, stored_bytes
from pgsvd_vllm.format.schema import check_pivots

# Bytes in memory at a time; a whole number of elements of every dtype.
_PIECE = 24 * 2**20


def check_file(path: Path, out_features: Mapping[str, int], recorded: str | None) -> None:
    """Check the data of a weight file whose header is valid.

    Args:
        path: of the file.
        out_features: tensor of pivots -> rows of the dense weight.
        recorded: the file's SHA-256 in hexadecimal digits; None if it is not known.

    Raises:
        CheckpointError: the file is damaged, a tensor holds NaN or infinity, or pivots are not ascending row numbers.
    """
    digest = hashlib.sha256()
    fault: CheckpointError | None = None
    try:
        with safe_open(path, framework="pt") as header, path.open("rb") as file:
            parts = [(name, header.get_slice(name)) for name in header.offset_keys()]
            tensors = [(name, part.get_dtype(), math.prod(part.get_shape())) for name, part in parts]
            size = file.read(8)
            digest.update(size + file.read(int.from_bytes(size, "little")))
            for name, dtype, numel in tensors:  # without gaps, as safetensors has checked
                try:
                    _check_tensor(file, digest, (name, dtype, stored_bytes(dtype, numel)), out_features.get(name))
                except CheckpointError as error:
                    # The rest is still hashed: that the file is damaged is the better message.
                    fault = fault or CheckpointError(f"{path}: {error}")
            digest.update(file.read())
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if recorded is not None:
        check_sum(path, digest.hexdigest(), recorded)
    if fault is not None:
        raise fault


def _check_tensor(
    file: io.BufferedReader, digest: "hashlib._Hash", header: tuple[str, str, int], rows: int | None
) -> None:
    """Read, hash and check the next tensor of a file.

    Args:
        file: at the begin of the tensor.
        digest: of the file so far.
        header: name, dtype and bytes of the tensor.
        rows: of the dense weight, for pivots; otherwise None.
    """
    name, dtype, left = header
    whole, finite, pieces = left, True, []
    while left:
        data = bytearray(min(left, _PIECE))
        if file.readinto(data) != len(data):
            raise OSError("truncated while it was read")
        digest.update(data)
        left -= len(data)
        piece = torch.frombuffer(data, dtype=torch.uint8)
        finite = finite and bytes_are_finite(piece, dtype)
        if rows is not None:
            pieces.append(piece)
    if not finite:
        raise CheckpointError(f"tensor {name} holds NaN or infinity")
    if rows is not None and whole:
        check_pivots(torch.cat(pieces).view(torch.int32), rows, name)
