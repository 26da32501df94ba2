"""Quantized matrices: their schemes in the vocabulary of compressed-tensors, their tensors, and their values.

A quantized matrix M [rows, columns] is stored as two tensors in place of one:
  `M_packed`  int8 or float8 (e4m3) [rows, columns], or int32 [rows, columns / 8] with eight 4-bit integers each
  `M_scale`   float32 [rows, 1] or bfloat16 [rows, groups]: element (i, j) of M is the packed value times scale
              (i, j // group_size)
Zero points are zero. A row is one group where the strategy is `channel`; otherwise the columns are a multiple of the
group size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from pgsvd_vllm.errors import CheckpointError

PACKED, SCALE = "_packed", "_scale"
# Inputs that share a scale in a 4-bit matrix.
GROUP_SIZES = (32, 64, 128)
# 4-bit integers in an element of a packed tensor.
PER_INT32 = 8


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized.

    Attributes:
        num_bits: 8 or 4.
        type: `int` or `float`.
        group_size: columns that share a scale; None for one scale per row.
        activations: whether the GEMM's input is quantized to the same type, with one dynamic scale per token.
    """

    num_bits: int
    type: str
    group_size: int | None = None
    activations: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the packed tensor, as safetensors names it."""
        return "I32" if self.num_bits == 4 else "I8" if self.type == "int" else "F8_E4M3"

    @property
    def scale_dtype(self) -> str:
        """The dtype of the scales; the rounding knows them, so 16 bits are enough where there are many."""
        return "F32" if self.group_size is None else "BF16"

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest packed value."""
        if self.type == "float":
            return -448.0, 448.0
        return float(-(2 ** (self.num_bits - 1))), float(2 ** (self.num_bits - 1) - 1)

    @property
    def key(self) -> str:
        """Its name in the module table, such as `int4-32`."""
        kind = f"{'fp' if self.type == 'float' else 'int'}{self.num_bits}"
        return kind if self.group_size is None else f"{kind}-{self.group_size}"

    @property
    def name(self) -> str:
        """Such as `INT4 in groups of 32`."""
        kind = f"{'FP' if self.type == 'float' else 'INT'}{self.num_bits}"
        return kind if self.group_size is None else f"{kind} in groups of {self.group_size}"

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns consist of whole groups."""
        return columns % (self.group_size or 1) == 0

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return columns // (self.group_size or columns)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Ending of a tensor's name -> shape, for a matrix [rows, columns] that fits."""
        width = columns // PER_INT32 if self.num_bits == 4 else columns
        return {PACKED: (rows, width), SCALE: (rows, self.groups(columns))}

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the stored tensors of a matrix [rows, columns] that fits."""
        scale = 4 if self.group_size is None else 2
        return rows * columns * self.num_bits // 8 + scale * rows * self.groups(columns)

    def section(self) -> dict[str, Any]:
        """The scheme as config.json has it, in the vocabulary of compressed-tensors."""
        common = {"num_bits": self.num_bits, "type": self.type, "symmetric": True}
        strategy = "channel" if self.group_size is None else "group"
        weights = {**common, "strategy": strategy, "group_size": self.group_size, "dynamic": False}
        inputs = {**common, "strategy": "token", "dynamic": True} if self.activations else None
        return {"weights": weights, "input_activations": inputs}


INT8 = Scheme(8, "int", activations=True)
FP8 = Scheme(8, "float", activations=True)


def int4(group_size: int) -> Scheme:
    """4-bit integers with 16-bit activations."""
    return Scheme(4, "int", group_size)


KNOWN = (INT8, FP8, *(int4(size) for size in GROUP_SIZES))


def parse_scheme(section: object, where: str) -> Scheme:
    """The scheme that a section of config.json describes.

    Args:
        section: `weights` and `input_activations` in the vocabulary of compressed-tensors.
        where: file and key, for errors.

    Raises:
        CheckpointError: it is malformed, or not one of KNOWN.
    """
    for scheme in KNOWN:
        if section == scheme.section():
            return scheme
    raise CheckpointError(f"{where}: unknown quantization {section!r}; known: {', '.join(s.name for s in KNOWN)}")


def pack(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The packed tensor of quantized values, int8 or float8 [rows, columns]."""
    if scheme.num_bits == 8:
        return values.contiguous()
    # Here: its import takes a second.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(values, scheme.num_bits).contiguous()


def unpack(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The quantized values, int8 or float8 [rows, columns], of a packed tensor."""
    if scheme.num_bits == 8:
        return packed
    # compressed-tensors stores them with an offset of 8, the first in the lowest bits. Its own function takes 20 times
    # as long.
    shifts = 4 * torch.arange(PER_INT32, dtype=torch.int32, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & 15
    return (values - 8).to(torch.int8).flatten(1)


def elements_of(suffix: str, tensor: torch.Tensor) -> int:
    """The elements of the matrix or vector that a stored tensor stands for; none for scales."""
    if suffix.endswith(SCALE):
        return 0
    return tensor.numel() * (PER_INT32 if suffix.endswith(PACKED) and tensor.dtype == torch.int32 else 1)


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of quantized values in a float dtype.

    Args:
        values: int8 or float8 [rows, columns].
        scale: float [rows, groups].
        dtype: of the computation and the result.
    """
    rows, groups = scale.shape
    parts = values.to(dtype).view(rows, groups, -1)
    return (parts * scale.to(dtype).unsqueeze(-1)).view(rows, -1)
