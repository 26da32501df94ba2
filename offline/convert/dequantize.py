"""Makes a dense checkpoint of a quantized one, with the converters of compressed-tensors, one weight file at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from pgsvd_vllm.errors import InputError, as_interruption, reason_of, refusal_of
from pgsvd_vllm.format.reader import TensorInfo
from pgsvd_vllm.format.writer import save_config
from pgsvd_vllm.offline.convert.new_folder import NEW, new_folder, refuse_existing
from pgsvd_vllm.offline.model.companions import find_companions, without_local_code
from pgsvd_vllm.offline.model.model_folder import INDEX_FILE, SINGLE_FILE, read_model_config
from pgsvd_vllm.offline.model.quantized import DENSE_DTYPES, quantization_of, without_sections
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
            group = section.get("config_groups", {}).get(name)
            stated = (group.get("format") if isinstance(group, dict) else None) or section.get("format")
            if stated not in (None, CompressionFormat.mixed_precision.value):
                scheme.format = CompressionFormat(stated)

    def validate(self, tensors: dict[str, torch.Tensor]) -> None:
        """As of the base class, for the weights alone."""
        super().validate(_weights(tensors))

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of the base class, for the weights alone."""
        return super().process(_weights(tensors))


class _BlockDequantizer(FP8BlockDequantizer):
    """compressed-tensors' own dequantizer of FP8 in blocks, which cannot save weights that end inside a block.

    The dequantizer of compressed-tensors' own checkpoints takes the size of the blocks from the number of scales, which
    is wrong for such weights; so it takes these as well.

    Args:
        ignore: modules that are not quantized.
        block: rows and columns of a block.
        dtype: of the dense weights.
        scale: name of the scales, `weight_scale_inv` or `weight_scale`.
    """

    def __init__(self, ignore: list[str], block: Sequence[int], dtype: torch.dtype, scale: str) -> None:
        super().__init__(ignore, ["re:.*"], (block[0], block[1]), dtype)
        self._scale = f".{scale}"

    def _usual(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors with the names that the base class expects."""
        ends = self._scale, ".weight_scale_inv"
        return {n.removesuffix(ends[0]) + ends[1] if n.endswith(ends[0]) else n: t for n, t in tensors.items()}

    def get_dependencies(self, weight_name: str) -> set[str]:
        """As of the base class."""
        found = super().get_dependencies(weight_name)
        return {name.removesuffix(".weight_scale_inv") + self._scale for name in found}

    def validate(self, tensors: dict[str, torch.Tensor]) -> None:
        """As of the base class, for the weights alone."""
        super().validate(self._usual(_weights(tensors)))

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of the base class, in contiguous memory."""
        found = super().process(self._usual(_weights(tensors)))
        return {name: tensor.contiguous() for name, tensor in found.items()}


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
    refuse_existing(output)
    config = read_model_config(folder)
    method, section = quantization_of(config, folder)
    tensors, dtype = find_tensors(folder), weight_dtype(config, folder)
    files = [*sorted({info.file.relative_to(folder) for info in tensors.values()})]
    files += find_companions(folder, trust_remote_code)
    files += [Path(INDEX_FILE)] if (folder / INDEX_FILE).is_file() and Path(SINGLE_FILE) not in files else []
    with new_folder(output) as scratch:
        dense = scratch / NEW
        try:
            with as_interruption(), _quiet():
                source = _linked(folder, _folder(scratch / "source"), files)
                _write_config(source, config if trust_remote_code else without_local_code(config), section)
                if method == "awq":
                    packed = _folder(scratch / "packed")
                    convert_checkpoint(source, packed, AutoAWQConverter.from_autoawq_config(section))
                    source, tensors = packed, find_tensors(packed)
                    section = quantization_of(read_model_config(source), source)[1]
                convert_checkpoint(source, dense, _converter(source, method, section, tensors, dtype))
                nbytes = ModelSource(dense, trust_remote_code).weights.nbytes
        except Exception as error:  # the converters raise many kinds for what they do not expect
            if refusal_of(error, str(output)) is not None:
                raise
            reason = reason_of(error).replace(str(dense), str(output))
            raise InputError(f"{folder}: cannot be made dense ({method}: {reason})") from None
    return Dequantized(method, dtype, nbytes)


def _write_config(folder: Path, config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    """Write config.json with its quantization section at the top alone, where the converters look for it."""
    usual = {**without_sections(config), "quantization_config": {**section, "ignore": section.get("ignore") or []}}
    save_config(folder, usual)


def _converter(
    source: Path, method: str, section: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: torch.dtype
) -> Any:
    """The converter of a quantized checkpoint; raises InputError for groups that it would take for others."""
    # The converters take every weight that is not ignored for a quantized one.
    ignore = [_module(n) for n, info in tensors.items() if _is_dense_weight(n, info, tensors)]
    if method == "fp8":
        return _BlockDequantizer(ignore, section["weight_block_size"], dtype, "weight_scale_inv")
    converter = _Dequantizer(source, section, ignore, dtype)
    blocks = {
        tuple(scheme.weights.block_structure or ()) if scheme.weights.strategy == "block" else None
        for scheme in converter.quant_config.config_groups.values()
        if scheme.weights is not None
    }
    if blocks == {None}:
        return converter
    (block, *others) = blocks
    if others or block is None:
        raise InputError("config.json: has groups of weights in blocks beside others")
    return _BlockDequantizer(ignore, block, dtype, "weight_scale")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_dense_weight(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is a weight without scales."""
    scales = (f"{name}_scale", f"{name}_scale_inv")
    return name.endswith(".weight") and info.dtype in DENSE_DTYPES and not any(one in tensors for one in scales)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _linked(folder: Path, target: Path, files: Iterable[Path]) -> Path:
    """A folder with links to some files of a model, since the converter copies all that it finds."""
    for path in files:
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
