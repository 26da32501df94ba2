"""What a run has decided and measured, for its checkpoint, report and model card."""

from dataclasses import dataclass, field
from pathlib import Path

from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.records import LMHeadFactors, ModuleReport


@dataclass(frozen=True)
class Choice:
    """The ranks of a run and what they follow from.

    Attributes:
        allocation: tolerances and ranks.
        front: of size, or latency, and predicted loss; None where sensitivities are taken as equal.
        tokens: projection of a MoE expert or projector -> calibration tokens that reached it.
        lm_head: the factored LM head, or its report where it stays dense; None where it was not asked for.
    """

    allocation: Allocation
    front: LossFront | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    lm_head: LMHeadFactors | None = None


@dataclass(frozen=True)
class CompressResult:
    """What was written.

    Attributes:
        output: the folder.
        choice: the ranks.
        modules: one row for each projection, factored or dense.
        parameters_before, parameters_after: of the whole model.
        tensors: written.
        is_dual_encoder: whether the model compares images with texts, and is served to embed them.
    """

    output: Path
    choice: Choice
    modules: list[ModuleReport]
    parameters_before: int
    parameters_after: int
    tensors: int
    is_dual_encoder: bool

    @property
    def ratios(self) -> dict[str, float]:
        """Share of parameters removed: of the projections, and of the whole model."""
        total = 1 - self.parameters_after / self.parameters_before
        return {"linear": round(self.choice.allocation.removed, 6), "total": round(total, 6)}
