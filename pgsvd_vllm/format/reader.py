"""Reads and validates a checkpoint; only `check_data` reads tensor data."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import (
    FACTOR_SUFFIXES,
    FLOAT_DTYPES,
    INDEX_NAME,
    QUANT_METHOD,
    FactoredModule,
    check_pivots,
    parse_modules,
)

DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class TensorInfo:
    """The header of a stored tensor.

    Attributes:
        file: that holds the tensor.
        shape: of the tensor.
        dtype: as safetensors names it, such as `BF16`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers agree with its module table.

    Attributes:
        folder: the checkpoint's folder.
        config: config.json as read.
        modules: module name -> its row of the module table.
        tensors: tensor name -> header, of all weight files.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, FactoredModule]
    tensors: dict[str, TensorInfo]

    @property
    def head(self) -> str | None:
        """The name of the LM head if it is factored, else None."""
        return self.config.get("quantization_config", {}).get("head")

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` section of config.json."""
        return self.config["quantization_config"]

    def shape(self, module: str) -> tuple[int, int, int]:
        """(out, in, rank) of a factored module."""
        row = self.modules[module]
        return *weight_shape(module, row, self.tensors), row.rank


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: the file is missing or cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        CheckpointError: the folder or the file is missing or malformed.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        raise CheckpointError(f"{folder}: no such folder")
    return read_json(folder / "config.json")


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Read the headers of one safetensors file: tensor name -> header.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = file.get_slice(name)
                found[name] = TensorInfo(path, tuple(part.get_shape()), part.get_dtype())
            return found
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_index(folder: Path, index_name: str) -> dict[str, TensorInfo]:
    """Read the headers of all weight files of an index, and check them against it: tensor name -> header.

    Raises:
        CheckpointError: a file is missing or damaged, or index and files disagree.
    """
    index_path = folder / index_name
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    for tensor, file_name in weight_map.items():
        # A file name from a hostile index must not point outside the folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise CheckpointError(f"{index_path}: tensor {tensor!r} points to {file_name!r}, not a file name")
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, info in read_headers(folder / file_name).items():
            if name in tensors:
                raise CheckpointError(f"{info.file}: tensor {name!r} is also in {tensors[name].file.name}")
            if weight_map.get(name) != file_name:
                raise CheckpointError(f"{info.file}: tensor {name!r} is not listed in {index_name}")
            tensors[name] = info
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file_name}: tensor {name!r} of {index_name} is missing")
    return tensors


def check_factors(modules: Mapping[str, FactoredModule], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check that the factors are exactly those of the module table.

    Args:
        modules: the module table.
        tensors: tensor name -> header.
        where: folder or file to name in errors.

    Raises:
        CheckpointError: names the first factor that is missing, extra or of the wrong shape or dtype.
    """
    for name, module in modules.items():
        if f"{name}.weight" in tensors:
            raise CheckpointError(f"{where}: contains both {name}.weight and the factors of {name}")
        for suffix in module.suffixes:
            info = tensors.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError(f"{where}: tensor {name}.{suffix} is missing")
            dimensions = 1 if suffix == "pivots" else 2
            if len(info.shape) != dimensions or 0 in info.shape:
                raise CheckpointError(
                    f"{info.file}: {name}.{suffix} has shape {info.shape}, not {dimensions} dimensions"
                )
            allowed = ("I32",) if suffix == "pivots" else FLOAT_DTYPES
            if info.dtype not in allowed:
                raise CheckpointError(
                    f"{info.file}: {name}.{suffix} has dtype {info.dtype}, not {' or '.join(allowed)}"
                )
        stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in module.suffixes}
        first = stored[module.suffixes[0]]
        if {s: info.shape for s, info in stored.items()} != module.shapes(*weight_shape(name, module, tensors)):
            found = " and ".join(f"{suffix} {info.shape}" for suffix, info in stored.items())
            raise CheckpointError(f"{first.file}: {name} has {found}, but the table says rank {module.rank}")
        kinds = {info.dtype for suffix, info in stored.items() if suffix != "pivots"}
        if len(kinds) > 1:
            found = " and ".join(f"{suffix} in {info.dtype}" for suffix, info in stored.items())
            raise CheckpointError(f"{first.file}: {name} has {found}")
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in FACTOR_SUFFIXES and (stem not in modules or suffix not in modules[stem].suffixes):
            raise CheckpointError(f"{info.file}: {name} belongs to no module of the table in config.json")


def weight_shape(name: str, module: FactoredModule, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(out, in) of the dense weight of a factored module, from its tensors' headers."""
    down, up = (tensors[f"{name}.{suffix}"].shape for suffix in module.suffixes[:2])
    return up[0] + (module.rank if module.form == "pivot" else 0), down[1]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and validate a checkpoint's config, index and headers; no tensor data is read.

    Raises:
        CheckpointError: names the file, tensor or key that is wrong.
    """
    folder = Path(folder)
    config = read_config(folder)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: not a pgsvd checkpoint (config.json has no quantization_config of method "
            f"{QUANT_METHOD!r}); make one with: pgsvd-vllm compress {folder} -o DIR"
        )
    modules = parse_modules(section, str(folder / "config.json"))
    tensors = read_index(folder, INDEX_NAME)
    check_factors(modules, tensors, str(folder))
    # If a dense tensor is missing from file and index alike, vLLM would serve uninitialised memory.
    if section.get("tensors", len(tensors)) != len(tensors):
        raise CheckpointError(
            f"{folder / INDEX_NAME}: lists {len(tensors)} tensors, config.json promises {section['tensors']}; "
            "the checkpoint is incomplete, copy or compress it again"
        )
    return Checkpoint(folder, config, modules, tensors)


def check_data(checkpoint: Checkpoint) -> None:
    """Read and check the values of every tensor.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or pivots are not ascending row numbers.
    """
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
                module, _, suffix = name.rpartition(".")
                if suffix == "pivots" and module in checkpoint.modules:
                    check_pivots(tensor, checkpoint.shape(module)[0], f"{name} in {path}")
