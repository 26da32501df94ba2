"""The outcome of a run: its ranks, and the checkpoint that was written."""

from dataclasses import dataclass, field
from pathlib import Path

from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.records import LMHeadFactors, ModuleReport


@dataclass(frozen=True)
class Choice:
    """The ranks of a run and the data behind them.

    Attributes:
        allocation: tolerances and ranks.
        front: of size, or GEMM latency, and predicted loss; None if sensitivities are assumed equal.
        tokens: projection of an MoE expert or projector -> calibration tokens that reach it.
        lm_head: the factored LM head, without tensors if it stays dense; None if it is not compressed.
    """

    allocation: Allocation
    front: LossFront | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    lm_head: LMHeadFactors | None = None


@dataclass(frozen=True)
class CompressResult:
    """The written checkpoint.

    Attributes:
        output: its folder.
        choice: the ranks.
        modules: one row for each projection, factored or dense.
        bytes_before: of the whole dense model's tensors.
        parameters_before: of the whole dense model.
        parameters_after: of the whole checkpoint.
        tensors: number of written tensors.
        is_dual_encoder: whether the model is a dual encoder, which vLLM serves with the pooling runner.
    """

    output: Path
    choice: Choice
    modules: list[ModuleReport]
    bytes_before: int
    parameters_before: int
    parameters_after: int
    tensors: int
    is_dual_encoder: bool

    @property
    def ratios(self) -> dict[str, float]:
        """Removed shares of the parameters, 0 to 1: `linear` of the projections, `total` of the whole model."""
        total = 1 - self.parameters_after / self.parameters_before
        return {"linear": round(self.choice.allocation.removed, 6), "total": round(total, 6)}
