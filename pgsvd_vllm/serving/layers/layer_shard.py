"""The checkpoint modules inside a vLLM layer, and the names of their tensors."""

import math
from dataclasses import dataclass, replace

import torch

from pgsvd_vllm.format.quantization import PACKED, SCALE, Scheme
from pgsvd_vllm.format.schema import FactoredModule

# The matrices with the layer's inputs as columns, and those with its outputs as rows.
STACKED = ("weight_v", "weight_p", "weight")
BY_ROWS = ("weight", "weight_u")
# The dtypes of packed tensors.
DTYPES = {"I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}


def matrix_of(kind: str) -> str:
    """The suffix of the matrix to which a stored tensor belongs."""
    return kind.removesuffix(PACKED).removesuffix(SCALE)


def is_stacked(kind: str) -> bool:
    """Whether a parameter is [sum of rows, in], not flat."""
    return not kind.endswith(SCALE) and matrix_of(kind) in STACKED


def on_rank(scheme: Scheme, columns: int) -> Scheme:
    """The scheme of a rank's columns of a matrix, whose groups are finer where they do not divide these columns."""
    if scheme.fits(columns) or scheme.group_size is None:
        return scheme
    return replace(scheme, group_size=math.gcd(scheme.group_size, columns))


@dataclass(frozen=True)
class LayerShard:
    """One checkpoint module inside a vLLM layer.

    Attributes:
        name: module name in the checkpoint, for messages.
        module: its rank and form; None if it is dense and not quantized.
        partitions: of the layer's outputs that it stands for, where the layer has several shards.
    """

    name: str
    module: FactoredModule | None
    partitions: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return ("weight",) if self.module is None else self.module.suffixes

    @property
    def is_dense(self) -> bool:
        """Whether it is not factored."""
        return self.module is None or self.module.is_dense

    def scheme(self, kind: str) -> Scheme | None:
        """The scheme of the matrix to which a stored tensor belongs; None if it is not quantized."""
        return None if self.module is None else self.module.schemes.get(matrix_of(kind))
