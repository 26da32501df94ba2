"""A quantized matrix as the GEMMs get it: 8-bit values, or 4-bit integers in int8, and their scales."""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] of quantized values.

    Attributes:
        values: int8 or float8 [rows, columns].
        scale: float32 [rows, groups]; element (i, j) of the matrix is its value times scale (i, j // (columns /
            groups)).
        num_bits: 8, or 4 for values from -8 to 7.
    """

    values: torch.Tensor
    scale: torch.Tensor
    num_bits: int

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """The same matrix on another device."""
        return QuantizedMatrix(self.values.to(device), self.scale.to(device), self.num_bits)

    def double(self) -> torch.Tensor:
        """The exact matrix, float64 [rows, columns]."""
        size = self.shape[1] // self.scale.shape[1]
        return self.values.double() * self.scale.double().repeat_interleave(size, dim=1)

    def __getitem__(self, rows: torch.Tensor) -> "QuantizedMatrix":
        """Some rows, by their numbers or a mask."""
        return QuantizedMatrix(self.values[rows], self.scale[rows], self.num_bits)

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """That holds it."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix, where scales of groups have 16 bits."""
        return self.values.numel() * self.num_bits // 8 + self.scale.numel() * (4 if self.scale.shape[1] == 1 else 2)


Matrix = torch.Tensor | QuantizedMatrix


def stacked(parts: list[Matrix]) -> list[Matrix]:
    """Matrices of the same number of columns; neighbours of one kind become one, the first on top."""
    found: list[Matrix] = []
    for _, same in itertools.groupby(parts, _kind):
        group = list(same)
        quantized = [part for part in group if isinstance(part, QuantizedMatrix)]
        if len(group) == 1:
            found += group
        elif quantized:
            values, scale = torch.cat([p.values for p in quantized]), torch.cat([p.scale for p in quantized])
            found.append(QuantizedMatrix(values, scale, quantized[0].num_bits))
        else:
            found.append(torch.cat([part for part in group if isinstance(part, torch.Tensor)]))
    return found


def _kind(matrix: Matrix) -> tuple[object, ...]:
    """What matrices of one GEMM have in common."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.values.dtype, matrix.num_bits, matrix.scale.shape[1]
    return (matrix.dtype,)
