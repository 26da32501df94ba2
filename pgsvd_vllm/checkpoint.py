"""The checkpoint format, version 1: schema, reading, validation.

A checkpoint is a Hugging Face model folder in which some projections P carry, in place of
`P.weight` [out, in], two factors: `P.weight_v` [rank, in] and `P.weight_u` [out, rank], with
`weight = weight_u @ weight_v`. `config.json` lists them under `quantization_config.modules`.

The weight files are named `pgsvd-*.safetensors`, not `model-*.safetensors`: a library that does
not know the format finds no weights and says so, where it would otherwise fill the missing
`P.weight` with random numbers. This module imports neither vLLM nor the compression side.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pgsvd_vllm.errors import CheckpointError

FORMAT_VERSION = 1
QUANT_METHOD = "pgsvd"
WEIGHTS_STEM = "pgsvd"
INDEX_NAME = f"{WEIGHTS_STEM}.safetensors.index.json"
# Named by config.json as the weight file. It does not exist: a transformers that has not imported
# pgsvd_vllm.hf stops there, and the name tells what to do. pgsvd_vllm.hf replaces it by INDEX_NAME.
LOAD_GUARD = "needs-import-pgsvd_vllm.hf.safetensors"
REPORT_NAME = "pgsvd_report.json"

FACTOR_SUFFIXES = ("weight_v", "weight_u")
FORMS = ("factors",)
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredModule:
    """One row of the module table: how projection P is stored."""

    rank: int
    form: str = "factors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says, without its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 0)


DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers and table have been found consistent.

    Attributes:
        folder: the checkpoint's folder.
        config: config.json as read.
        modules: module name -> how it is factored.
        tensors: tensor name -> header entry, over all weight files.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, FactoredModule]
    tensors: dict[str, TensorInfo]

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The format's own section of config.json."""
        return self.config["quantization_config"]

    def shape(self, module: str) -> tuple[int, int, int]:
        """(out, in, rank) of a factored module."""
        v = self.tensors[f"{module}.weight_v"].shape
        return self.tensors[f"{module}.weight_u"].shape[0], v[1], v[0]


def parse_modules(section: Mapping[str, Any], where: str) -> dict[str, FactoredModule]:
    """Check `quantization_config` and return its module table.

    Args:
        section: the `quantization_config` of a config.json.
        where: what to name in errors, usually the file.

    Raises:
        CheckpointError: wrong method, unknown version or form, or a malformed table.
    """
    method = section.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quantization method is {method!r}, not {QUANT_METHOD!r}")
    version = section.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{where}: checkpoint format version {version!r} is not readable here (this is version "
            f"{FORMAT_VERSION}); it was written by pgsvd-vllm {section.get('tool_version', 'unknown')}: "
            "install that version or a later one"
        )
    table = section.get("modules")
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{where}: quantization_config.modules is missing or not a table")
    modules: dict[str, FactoredModule] = {}
    for name, row in table.items():
        rank = row.get("rank") if isinstance(row, Mapping) else None
        form = row.get("form") if isinstance(row, Mapping) else None
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CheckpointError(f"{where}: module {name!r} has rank {rank!r}, not a positive integer")
        if form not in FORMS:
            raise CheckpointError(f"{where}: module {name!r} has form {form!r}; known forms: {', '.join(FORMS)}")
        modules[name] = FactoredModule(rank=rank, form=form)
    return modules


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
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
    """config.json of a model folder.

    Raises:
        CheckpointError: the folder or the file is missing or malformed.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        raise CheckpointError(f"{folder}: no such folder")
    return read_json(folder / "config.json")


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor of one safetensors file.

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
    """Headers of all weight files that an index names, checked against the index.

    Raises:
        CheckpointError: a file is missing or damaged, or index and files disagree.
    """
    index_path = folder / index_name
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    for tensor, file_name in weight_map.items():
        # A name from a hostile index must not reach outside the folder.
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
    """Check that the tensors are those the module table promises, no more and no fewer.

    Raises:
        CheckpointError: names the first factor that is missing, extra or of the wrong shape or dtype.
    """
    for name, module in modules.items():
        if f"{name}.weight" in tensors:
            raise CheckpointError(f"{where}: {name}.weight stands beside the factors of {name}")
        for suffix in FACTOR_SUFFIXES:
            info = tensors.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError(f"{where}: tensor {name}.{suffix} is missing")
            if len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(f"{info.file}: {name}.{suffix} has shape {info.shape}, not two dimensions")
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{info.file}: {name}.{suffix} has dtype {info.dtype}, not a float dtype")
        v, u = tensors[f"{name}.weight_v"], tensors[f"{name}.weight_u"]
        if v.shape[0] != module.rank or u.shape[1] != module.rank:
            raise CheckpointError(
                f"{v.file}: {name} has weight_v {v.shape} and weight_u {u.shape}, but the table says rank {module.rank}"
            )
        if v.dtype != u.dtype:
            raise CheckpointError(f"{v.file}: {name} has weight_v in {v.dtype} and weight_u in {u.dtype}")
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in FACTOR_SUFFIXES and stem not in modules:
            raise CheckpointError(f"{info.file}: {name} belongs to no module of the table in config.json")


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
    # A dense tensor that is gone from file and index alike: vLLM would serve uninitialised memory.
    if section.get("tensors", len(tensors)) != len(tensors):
        raise CheckpointError(
            f"{folder / INDEX_NAME}: lists {len(tensors)} tensors, config.json promises {section['tensors']}; "
            "the checkpoint is incomplete, copy or compress it again"
        )
    return Checkpoint(folder, config, modules, tensors)


def find_non_finite(checkpoint: Checkpoint) -> str | None:
    """Read every tensor once; return the name of the first that holds NaN or infinity, if any."""
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    return name
    return None


class ShardWriter:
    """Writes tensors as they come into safetensors files of bounded size, then the index.

    Args:
        folder: an existing folder.
        max_bytes: size at which a new file is begun.
    """

    def __init__(self, folder: Path, max_bytes: int = 2 * 1024**3) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; writes a file when enough have come."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size

    @property
    def count(self) -> int:
        """Tensors added so far."""
        return sum(len(names) for names in self._files) + len(self._pending)

    def _temporary(self, number: int) -> Path:
        return self.folder / f"{WEIGHTS_STEM}-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._files.append(list(self._pending))
        save_file(self._pending, self._temporary(len(self._files)), metadata={"format": "pt"})
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> int:
        """Write what is queued and the index; returns the bytes of all tensors."""
        if self._pending:
            self._flush()
        count = len(self._files)
        weight_map = {}
        for number, names in enumerate(self._files, 1):
            final = f"{WEIGHTS_STEM}-{number:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return self._total_bytes
