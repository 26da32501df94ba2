"""Makes a dense checkpoint of a quantized one, with the converters of compressed-tensors, one weight file at a time."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.entrypoints.convert import (
    AutoAWQConverter,
    CompressedTensorsDequantizer,
    FP8BlockDequantizer,
    convert_checkpoint,
)
from loguru import logger

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.format.reader import TensorInfo
from pgsvd_vllm.offline.model.companions import find_companions
from pgsvd_vllm.offline.model.model_folder import INDEX_FILE, SINGLE_FILE, read_model_config
from pgsvd_vllm.offline.model.quantized import DENSE_DTYPES, quantization_of
from pgsvd_vllm.offline.model.source import ModelSource, weight_dtype
from pgsvd_vllm.offline.model.weights import find_tensors

# Scales of activations, which dense weights do not have.
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")


class _Dequantizer(CompressedTensorsDequantizer):
    """compressed-tensors' own dequantizer, which refuses scales of static activations and guesses each group's format.

    Args:
        source: the quantized model's folder.
        section: its quantization_config.
        ignore: modules that are not quantized.
        dtype: of the dense weights.
    """

    def __init__(self, source: Path, section: Mapping[str, Any], ignore: list[str], dtype: torch.dtype) -> None:
        super().__init__(source, ignore, dtype)
        for name, scheme in self.quant_config.config_groups.items():
            groups = section.get("config_groups", {})
            stated = groups.get(name, {}).get("format") or section.get("format")
            if stated not in (None, CompressionFormat.mixed_precision.value):
                scheme.format = CompressionFormat(stated)

    def validate(self, tensors: dict[str, torch.Tensor]) -> None:
        """As of the base class, for the weights alone."""
        super().validate(_weights(tensors))

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of the base class, for the weights alone."""
        return super().process(_weights(tensors))


class _BlockDequantizer(FP8BlockDequantizer):
    """compressed-tensors' own dequantizer of FP8 in blocks, which cannot save weights that end inside a block."""

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of the base class, in contiguous memory."""
        return {name: tensor.contiguous() for name, tensor in super().process(tensors).items()}


def _weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_ACTIVATIONS)}


@dataclass(frozen=True)
class Dequantized:
    """A dense checkpoint that was made of a quantized one.

    Attributes:
        method: `quant_method` of the quantized one.
        dtype: of the weights that were quantized.
        nbytes: of all weights.
    """

    method: str
    dtype: torch.dtype
    nbytes: int


def dequantize(folder: Path, output: Path, trust_remote_code: bool = False) -> Dequantized:
    """Write the dense version of a checkpoint in compressed-tensors, block-wise FP8 or AWQ.

    Weights have the dtype that config.json names; tensors that are not quantized stay as they are.

    Args:
        folder: of the quantized model.
        output: folder to write, complete or not at all; must not exist.
        trust_remote_code: copy modelling code, and run it for the check of the result.

    Raises:
        InputError: the output exists or cannot be written, or the model is not quantized, or in a way that
            compressed-tensors cannot convert; names the tool that can where there is one.
        CheckpointError: a file of the model is missing or damaged.
    """
    if os.path.lexists(output):
        raise InputError(f"`output_dir` {output}: already exists; remove it or choose another folder")
    config = read_model_config(folder)
    method, section = quantization_of(config, folder)
    tensors, dtype = find_tensors(folder), weight_dtype(config, folder)
    companions = find_companions(folder, trust_remote_code)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as name, _quiet():
            room = Path(name)
            source = _linked(folder, room / "source", tensors, companions)
            if method == "awq":
                packed = _folder(room / "packed")
                convert_checkpoint(source, packed, AutoAWQConverter.from_autoawq_config(section))
                source, tensors = packed, find_tensors(packed)
                section = quantization_of(read_model_config(source), source)[1]
            # The converters take every weight that is not ignored for a quantized one.
            ignore = [_module(n) for n, info in tensors.items() if _is_dense_weight(n, info, tensors)]
            if method == "fp8":
                converter: Any = _BlockDequantizer(ignore, ["re:.*"], tuple(section["weight_block_size"]), dtype)
            else:
                converter = _Dequantizer(source, section, ignore, dtype)
            dense = _folder(room / "dense")
            convert_checkpoint(source, dense, converter)
            nbytes = ModelSource(dense, trust_remote_code).weights.nbytes
            dense.rename(output)
    except OSError as error:
        raise InputError(f"`output_dir` {output}: cannot be written ({reason_of(error)})") from None
    except Exception as error:  # the converters raise many kinds for what they do not expect
        raise InputError(
            f"{folder}: compressed-tensors cannot dequantize it ({method}: {reason_of(error)}); start from the dense "
            "model"
        ) from None
    return Dequantized(method, dtype, nbytes)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_dense_weight(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is a weight without scales."""
    scales = (f"{name}_scale", f"{name}_scale_inv")
    return name.endswith(".weight") and info.dtype in DENSE_DTYPES and not any(one in tensors for one in scales)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _linked(folder: Path, target: Path, tensors: Mapping[str, TensorInfo], companions: list[Path]) -> Path:
    """A folder with links to the files of a model that its dense version needs, since the converter copies all."""
    weights = {info.file.relative_to(folder) for info in tensors.values()}
    index = [name for name in (INDEX_FILE,) if (folder / name).is_file() and weights != {Path(SINGLE_FILE)}]
    for path in (Path("config.json"), *map(Path, index), *sorted(weights), *companions):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).symlink_to((folder / path).resolve())
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's log lines, one for every file that it copies."""
    logger.disable("compressed_tensors")
    try:
        yield
    finally:
        logger.enable("compressed_tensors")
