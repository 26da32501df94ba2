"""The target of rank selection: a ratio or a tolerance, for all towers or for each, and what ranks cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pgsvd_vllm.errors import ChoiceError, bytes_text
from pgsvd_vllm.format.latency_table import LatencyTable
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.ranks.stored import size
from pgsvd_vllm.offline.settings import Storage


@dataclass(frozen=True)
class Limit:
    """A limit on bytes or time that must hold.

    Attributes:
        option: of the run that sets it.
        value: the limit, in the unit.
        total: what the dense model has.
        projections: the part of it that belongs to the projections.
        unit: `bytes` or `ms`.
    """

    option: str
    value: float
    total: float
    projections: float
    unit: str

    @property
    def share(self) -> float:
        """The least share of the projections' part to remove."""
        return (self.total - self.value) / self.projections

    def beyond(self, most: float) -> ChoiceError:
        """The error where no more than a share `most` can be removed; it names the least value that is possible."""
        least = self.total - most * self.projections
        texts = [bytes_text(math.ceil(x)) if self.unit == "bytes" else f"{x:.3g} ms" for x in (self.value, least)]
        return ChoiceError(f"`{self.option}` {texts[0]}: the least that this model can have is {texts[1]}; raise it")


@dataclass(frozen=True)
class RankTarget:
    """The size, latency or error that the ranks must reach.

    Attributes:
        ratio: share to remove of the projections' parameters, 0 to 1, of their GEMM latency if `latencies` is given, or
            of their bytes if `itemsizes` is given; a dict has one share per tower. None with a `tolerance`.
        tolerance: relative output error allowed in every projection; a dict has one per tower. None with a `ratio`.
        storages: the ways to store a projection; several only with `itemsizes`.
        equal: whether every projection loses the same share of its parameters, as in the baseline methods.
        latencies: GEMM latencies of the serving machine.
        itemsizes: projection -> bytes of an element of its matrices that are not quantized.
        limit: that `ratio` stands for, so that no less may be removed; None where the closest share is taken.
        loss: largest predicted loss in nats per token, in place of a ratio.
    """

    ratio: float | dict[str, float] | None
    tolerance: float | dict[str, float] | None
    storages: tuple[Storage, ...]
    equal: bool = False
    latencies: LatencyTable | None = None
    itemsizes: Mapping[str, int] | None = None
    limit: Limit | None = None
    loss: float | None = None

    def of_towers(self) -> dict[str, "RankTarget"]:
        """Tower -> its target; empty if one ratio or tolerance holds for all towers."""
        if isinstance(self.ratio, dict):
            return {tower: replace(self, ratio=ratio) for tower, ratio in self.ratio.items()}
        if isinstance(self.tolerance, dict):
            return {tower: replace(self, tolerance=tolerance) for tower, tolerance in self.tolerance.items()}
        return {}

    def cost(self, projection: Projection, module: FactoredModule) -> float:
        """What a projection costs, stored as a row of the module table says, in elements, microseconds or bytes.

        Raises:
            InputError: the latency table lacks a shape.
        """
        shape = projection.out_features, projection.in_features
        if self.latencies is not None:
            return self.latencies.latency(*shape, module.form, None if module.is_dense else module.rank)
        if self.itemsizes is not None:
            return module.nbytes(*shape, self.itemsizes[projection.name])
        return size(projection, None if module.is_dense else module.rank, module.form)
