"""The checkpoint format, version 1: schema, reading, validation.

A checkpoint is a Hugging Face model folder in which some projections P carry, in place of
`P.weight` [out, in], a matrix of low rank in one of two forms:
  factors  `P.weight_v` [rank, in] and `P.weight_u` [out, rank], with weight = weight_u @ weight_v
  pivot    `P.weight_p` [rank, in], `P.weight_c` [out - rank, rank] and `P.pivots` int32 [rank]: the
           rows of the weight that `pivots` names are weight_p, the others are weight_c @ weight_p.
           The same matrix in rank^2 - rank fewer numbers (PIFA, arXiv 2501.19090).
`config.json` lists them under `quantization_config.modules`.

The weight files are named `pgsvd-*.safetensors`, not `model-*.safetensors`: a library that does
not know the format finds no weights and says so, where it would otherwise fill the missing
`P.weight` with random numbers. This module imports neither vLLM nor the compression side.
"""

import json
import math
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

# form -> its tensors; the first is the down factor [rank, in].
FORMS = {"factors": ("weight_v", "weight_u"), "pivot": ("weight_p", "weight_c", "pivots")}
FACTOR_SUFFIXES = tuple(suffix for suffixes in FORMS.values() for suffix in suffixes)
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredModule:
    """One row of the module table: how projection P is stored."""

    rank: int
    form: str = "factors"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return FORMS[self.form]

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors for a weight [out, in]."""
        return form_shapes(self.form, out_features, in_features, self.rank)


def form_shapes(form: str, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Tensor suffix -> shape, of a weight [out, in] stored with a rank in a form."""
    if form == "factors":
        return {"weight_v": (rank, in_features), "weight_u": (out_features, rank)}
    return {"weight_p": (rank, in_features), "weight_c": (out_features - rank, rank), "pivots": (rank,)}


def stored_size(form: str, out_features: int, in_features: int, rank: int) -> int:
    """Numbers stored for a weight [out, in] with a rank in a form, pivots counted as numbers."""
    return sum(math.prod(shape) for shape in form_shapes(form, out_features, in_features, rank).values())


def check_pivots(pivots: torch.Tensor, out_features: int, name: str) -> None:
    """Raise CheckpointError unless `pivots` are ascending rows of a weight with `out_features` rows."""
    rows = pivots.long()
    if (rows < 0).any() or (rows >= out_features).any() or (rows.diff() <= 0).any():
        raise CheckpointError(f"tensor {name}: not ascending row numbers from 0 to {out_features - 1}")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says, without its data."""

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
    def head(self) -> str | None:
        """The name of the output head, if that is factored."""
        return self.config.get("quantization_config", {}).get("head")

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The format's own section of config.json."""
        return self.config["quantization_config"]

    def shape(self, module: str) -> tuple[int, int, int]:
        """(out, in, rank) of a factored module."""
        row = self.modules[module]
        return *weight_shape(module, row, self.tensors), row.rank


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
        if not isinstance(form, str) or form not in FORMS:
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
    """(out, in) of the weight that a factored module stands for, from its tensors' headers."""
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
    # A dense tensor that is gone from file and index alike: vLLM would serve uninitialised memory.
    if section.get("tensors", len(tensors)) != len(tensors):
        raise CheckpointError(
            f"{folder / INDEX_NAME}: lists {len(tensors)} tensors, config.json promises {section['tensors']}; "
            "the checkpoint is incomplete, copy or compress it again"
        )
    return Checkpoint(folder, config, modules, tensors)


def check_data(checkpoint: Checkpoint) -> None:
    """Read every tensor once; raise CheckpointError for NaN, infinity, or pivots that are no rows."""
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
                module, _, suffix = name.rpartition(".")
                if suffix == "pivots" and module in checkpoint.modules:
                    check_pivots(tensor, checkpoint.shape(module)[0], f"{name} in {path}")


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
