"""The target of rank selection: a ratio or a tolerance, for all towers or for each."""

from dataclasses import dataclass

from pgsvd_vllm.format.latency_table import LatencyTable


@dataclass(frozen=True)
class RankTarget:
    """The size, latency or error that the ranks must reach.

    Attributes:
        ratio: share of the projections' parameters to remove, 0 to 1, or of their GEMM latency if `latencies` is given;
            a dict has one share per tower. None with a `tolerance`.
        tolerance: relative output error allowed in every projection; a dict has one per tower. None with a `ratio`.
        form: of the stored low-rank weights, `pivot` or `factors`.
        equal: whether every projection loses the same share of its parameters, as in the baseline methods.
        latencies: GEMM latencies of the serving machine; None if ranks minimise size.
    """

    ratio: float | dict[str, float] | None
    tolerance: float | dict[str, float] | None
    form: str
    equal: bool = False
    latencies: LatencyTable | None = None

    def of_towers(self) -> dict[str, "RankTarget"]:
        """Tower -> its target; empty if one ratio or tolerance holds for all towers."""
        if isinstance(self.ratio, dict):
            return {t: RankTarget(x, None, self.form, self.equal, self.latencies) for t, x in self.ratio.items()}
        if isinstance(self.tolerance, dict):
            return {t: RankTarget(None, x, self.form, self.equal, self.latencies) for t, x in self.tolerance.items()}
        return {}
