"""What the ranks of a run must reach."""

from dataclasses import dataclass

from pgsvd_vllm.format.latency_table import LatencyTable


@dataclass(frozen=True)
class RankTarget:
    """The size, latency or error that the ranks must reach.

    Attributes:
        ratio: share of the projections' parameters (of their latency where `latencies` is given) to remove; a dict
            has one share for each tower it names.
        tolerance: uniform relative output error to allow instead; a dict has one for each tower.
        form: how low-rank weights are stored.
        equal: whether every projection loses the same share, as baselines do.
        latencies: GEMM latencies of the serving machine; None where size is the objective.
    """

    ratio: float | dict[str, float] | None
    tolerance: float | dict[str, float] | None
    form: str
    equal: bool = False
    latencies: LatencyTable | None = None

    def of_towers(self) -> dict[str, "RankTarget"]:
        """One target for each tower that is named; empty where one number holds for all towers."""
        if isinstance(self.ratio, dict):
            return {t: RankTarget(x, None, self.form, self.equal, self.latencies) for t, x in self.ratio.items()}
        if isinstance(self.tolerance, dict):
            return {t: RankTarget(None, x, self.form, self.equal, self.latencies) for t, x in self.tolerance.items()}
        return {}
