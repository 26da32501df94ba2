"""The weights of one shard of a layer, on one tensor-parallel rank."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix

M_co = TypeVar("M_co", bound="torch.Tensor | QuantizedMatrix", covariant=True)


@dataclass(frozen=True)
class Shard(Generic[M_co]):
    """The weights of one shard: a dense matrix, plain factors, or a pivot form, each of them possibly quantized.

    A merged layer (QKV, gate and up) is a sequence of these, in the order of the layer's outputs.

    Attributes:
        down: the down factor [r, in], or the dense weight [out, in]. Where z is all-gathered, a rank holds
            [ceil(r / tp_size), in] of the down factor.
        up: the up factor [rows, r]; None for a dense shard. In the pivot form `rows` leaves out the pivot rows.
        places: int64 [out], the source of each output in the pivot form: i >= 0 is row i of `up`, -1 - j is
            component j of z. None for plain factors and for dense shards.
    """

    down: M_co
    up: M_co | None = None
    places: torch.Tensor | None = None

    @property
    def out(self) -> int:
        """Outputs of the shard on this rank."""
        if self.places is not None:
            return len(self.places)
        return len(self.down if self.up is None else self.up)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices; `places` is not counted."""
        return self.down.nbytes + (0 if self.up is None else self.up.nbytes)

    def to(self, device: torch.device) -> "Shard[torch.Tensor | QuantizedMatrix]":
        """The same weights on another device."""
        up = None if self.up is None else self.up.to(device)
        return Shard(self.down.to(device), up, None if self.places is None else self.places.to(device))
