"""Reads and validates a checkpoint; only `check_data` reads tensor data."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.checksums import check_sum, file_sum, for_each_file, recorded_sums
from pgsvd_vllm.format.dtypes import DTYPE_BITS, stored_bytes
from pgsvd_vllm.format.file_data import check_file
from pgsvd_vllm.format.quantization import PACKED, PER_INT32, SCALE
from pgsvd_vllm.format.schema import (
    DENSE_INDEX_NAME,
    FACTOR_SUFFIXES,
    FLOAT_DTYPES,
    INDEX_NAME,
    QUANT_METHOD,
    QUANTIZED_SUFFIXES,
    REPORT_NAME,
    FactoredModule,
    parse_modules,
)

_SUFFIX = ".safetensors"


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
        return stored_bytes(self.dtype, self.numel)


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
    def factored(self) -> list[str]:
        """The names of the factored modules, in the table's order; the others are quantized alone."""
        return [name for name, module in self.modules.items() if not module.is_dense]

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` section of config.json."""
        return self.config["quantization_config"]

    def stored(self, projection: str) -> list[TensorInfo]:
        """The headers of a projection's weight or of the tensors in its place; none if it is not part of the files."""
        module = self.modules.get(projection)
        names = [f"{projection}.{suffix}" for suffix in (("weight",) if module is None else module.suffixes)]
        return [self.tensors[name] for name in names if name in self.tensors]

    def shape(self, module: str) -> tuple[int, int, int]:
        """(out, in, rank) of a factored module."""
        row = self.modules[module]
        return *weight_shape(module, row, self.tensors), row.rank


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: the file is missing or cannot be read, or is not a JSON object.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: cannot be read (it is a pipe or a device)")  # reading might never end
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
                info = found[name] = TensorInfo(path, tuple(part.get_shape()), part.get_dtype())
                if info.dtype not in DTYPE_BITS:
                    raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {info.dtype}")
            return found
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_files(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    """Read the headers of several safetensors files: tensor name -> header.

    Raises:
        CheckpointError: a file is missing or damaged, or two files hold a tensor of one name.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_headers(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = info
    return tensors


def index_files(index: Mapping[str, Any], where: Path) -> list[str]:
    """The names of an index's weight files, sorted.

    Args:
        index: as read.
        where: the index, for errors.

    Raises:
        CheckpointError: the index has no weight map, or an entry is not the name of a safetensors file in its folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        # A file name from a hostile index must not point outside the folder; vLLM reads *.safetensors.
        if not isinstance(name, str) or Path(name).name != name or not Path(name).match(f"[!.]*{_SUFFIX}"):
            raise CheckpointError(
                f"{where}: tensor {tensor!r} points to {name!r}, not to a {_SUFFIX[1:]} file beside the index"
            )
    return sorted(set(weight_map.values()))


def read_index(folder: Path, index_name: str) -> dict[str, TensorInfo]:
    """Read the headers of all weight files of an index, and check them against it: tensor name -> header.

    Raises:
        CheckpointError: a file is missing or damaged, or index and files disagree.
    """
    index = read_json(folder / index_name)
    tensors = read_files(folder / name for name in index_files(index, folder / index_name))
    weight_map = index["weight_map"]
    for name, info in tensors.items():
        if weight_map.get(name) != info.file.name:
            raise CheckpointError(f"{info.file}: tensor {name!r} is not listed in {index_name}")
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
            allowed = _allowed_dtypes(module, suffix)
            if info.dtype not in allowed:
                raise CheckpointError(
                    f"{info.file}: {name}.{suffix} has dtype {info.dtype}, not {' or '.join(allowed)}"
                )
        stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in module.suffixes}
        first = stored[module.suffixes[0]]
        out, columns = weight_shape(name, module, tensors)
        for suffix, scheme in module.schemes.items():
            width = module.shapes(out, columns)[suffix][1]
            if not scheme.fits(width):
                raise CheckpointError(f"{first.file}: {name}.{suffix} has {width} columns, which is no {scheme.name}")
        if {s: info.shape for s, info in stored.items()} != module.stored_shapes(out, columns):
            found = " and ".join(f"{suffix} {info.shape}" for suffix, info in stored.items())
            raise CheckpointError(f"{first.file}: {name} has {found}, but the table says rank {module.rank}")
        kinds = {info.dtype for suffix, info in stored.items() if suffix in module.matrices}
        if len(kinds) > 1:
            found = " and ".join(f"{suffix} in {info.dtype}" for suffix, info in stored.items())
            raise CheckpointError(f"{first.file}: {name} has {found}")
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in (*FACTOR_SUFFIXES, *(QUANTIZED_SUFFIXES if stem in modules else ())) and (
            stem not in modules or suffix not in modules[stem].suffixes
        ):
            raise CheckpointError(f"{info.file}: {name} belongs to no module of the table in config.json")


def _allowed_dtypes(module: FactoredModule, suffix: str) -> tuple[str, ...]:
    """The dtypes that a stored tensor of a module may have."""
    if suffix == "pivots":
        return ("I32",)
    scheme = module.schemes.get(suffix.removesuffix(PACKED).removesuffix(SCALE))
    if scheme is None:
        return FLOAT_DTYPES
    return (scheme.dtype if suffix.endswith(PACKED) else scheme.scale_dtype,)


def weight_shape(name: str, module: FactoredModule, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(out, in) of the dense weight of a module of the table, from its tensors' headers."""

    def shape(suffix: str) -> tuple[int, int]:
        scheme = module.schemes.get(suffix)
        found = tensors[f"{name}.{suffix}{'' if scheme is None else PACKED}"].shape
        return found[0], found[1] * (PER_INT32 if scheme is not None and scheme.num_bits == 4 else 1)

    rows, columns = shape(module.matrices[0])
    if module.is_dense:
        return rows, columns
    return shape(module.matrices[1])[0] + (module.rank if module.form == "pivot" else 0), columns


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
    _check_strays(folder, tensors)
    check_factors(modules, tensors, str(folder))
    check_count(section, tensors, str(folder / INDEX_NAME))
    return Checkpoint(folder, config, modules, tensors)


def check_count(section: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check the number of tensors; vLLM would serve uninitialised memory in place of a missing dense one.

    Args:
        section: the `quantization_config` of config.json; without `tensors` nothing is checked.
        tensors: of all weight files.
        where: folder or file to name in errors.

    Raises:
        CheckpointError: it is not the number that config.json promises.
    """
    promised = section.get("tensors", len(tensors))
    if type(promised) is not int or promised != len(tensors):
        raise CheckpointError(
            f"{where}: lists {len(tensors)} tensors, config.json promises {promised!r}; "
            "the checkpoint is incomplete, copy or compress it again"
        )


def check_every_file(folder: Path, section: Mapping[str, Any], modules: Mapping[str, FactoredModule]) -> None:
    """Check that all safetensors files of a folder, which vLLM's own loaders read, are one complete checkpoint.

    Args:
        folder: with or without the index.
        section: the `quantization_config` of config.json.
        modules: its module table.

    Raises:
        CheckpointError: a tensor is missing or stored twice, or a factor does not fit the table.
    """
    if (folder / DENSE_INDEX_NAME).exists():
        raise CheckpointError(f"{folder / DENSE_INDEX_NAME}: the index of a dense model, which vLLM follows; delete it")
    tensors = read_files(_all_files(folder))
    check_factors(modules, tensors, str(folder))
    check_count(section, tensors, str(folder))


def _all_files(folder: Path) -> list[Path]:
    """The safetensors files that vLLM finds in a folder."""
    return sorted(folder.glob(f"[!.]*{_SUFFIX}"))


def _check_strays(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse files that vLLM's own loaders would read besides the index's, or in their place."""
    listed = {info.file for info in tensors.values()}
    index = folder / DENSE_INDEX_NAME
    for path in [*_all_files(folder), *([index] if index.exists() else [])]:
        if path not in listed:
            raise CheckpointError(
                f"{path}: not part of {INDEX_NAME}, but vLLM's own loaders would read it (without --load-format "
                f"{QUANT_METHOD}); delete or move it"
            )


def check_data(checkpoint: Checkpoint) -> bool:
    """Read every weight file once, and check its values and its checksum.

    Returns:
        whether the index records checksums.

    Raises:
        CheckpointError: a file is not the one that was written, a tensor holds NaN or infinity, or pivots are not
            ascending row numbers.
    """
    files = {info.file.name: info.file for info in checkpoint.tensors.values()}
    where = checkpoint.folder / INDEX_NAME
    sums = recorded_sums(read_json(where), files, where)
    rows = {
        f"{name}.pivots": checkpoint.shape(name)[0]
        for name, module in checkpoint.modules.items()
        if "pivots" in module.suffixes
    }
    for_each_file(
        [files[name] for name in sorted(files)],
        lambda path: check_file(path, rows, None if sums is None else sums[path.name]),
    )
    return sums is not None


def check_json_files(folder: Path) -> None:
    """Check that the JSON files beside the weights, such as the tokenizer, are not cut off; the report is left out.

    Raises:
        CheckpointError: a file is not JSON; names it.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name == REPORT_NAME or not os.path.isfile(path):
            continue
        try:
            json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from None


def check_sums(folder: Path) -> int:
    """Read every weight file once, and check its checksum.

    Returns:
        the number of files.

    Raises:
        CheckpointError: a file is not the one that was written, or the index records no checksums.
    """
    where = folder / INDEX_NAME
    index = read_json(where)
    files = index_files(index, where)
    sums = recorded_sums(index, files, where)
    if sums is None:
        raise CheckpointError(f"{where}: records no checksums, leave `verify_checksums` out")
    for_each_file([folder / name for name in files], lambda path: check_sum(path, file_sum(path), sums[path.name]))
    return len(files)
