"""The allocation of ranks and bits to projections.

PGSVD (arXiv 2510.05544, section 4) minimises size and error together. With equal sensitivities the same relative error
in every layer is optimal, and ranks differ between layers (see `uniform`). With measured sensitivities the ranks
minimise the summed predicted loss for a given size or for a given GEMM latency (see `pareto`).
"""

from dataclasses import dataclass

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.format.schema import FactoredModule

# Largest difference between the requested and the removed share.
RATIO_SLACK = 0.005


@dataclass(frozen=True)
class Allocation:
    """Which projections are factored, and with what rank, and which are quantized.

    Attributes:
        tolerances: tower -> bound on the relative output error of each of its projections; empty if sensitivities are
            measured or all projections have the same ratio.
        modules: projection name -> its row of the module table; projections that stay as they are are absent.
        removed: share of the projections' parameters that is removed, 0 to 1; ignored projections count as kept.
        loss: predicted loss, in nats per token, or with forward sensitivities as a share of the residual stream's
            energy; None if sensitivities are not measured.
        latency_removed: share of the projections' GEMM latency that is removed; None if ranks minimise size.
    """

    tolerances: dict[str, float]
    modules: dict[str, FactoredModule]
    removed: float
    loss: float | None = None
    latency_removed: float | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Projection name -> rank; projections that are not factored are absent."""
        return {name: module.rank for name, module in self.modules.items() if not module.is_dense}

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes of the quantized matrices, by name."""
        found = {scheme.key: scheme for module in self.modules.values() for scheme in module.schemes.values()}
        return [found[key] for key in sorted(found)]


def too_large(ratio: float, most: float, what: str = "") -> ChoiceError:
    """The error for a ratio above the largest removable share `most`, which is a share of `what`."""
    return ChoiceError(f"`ratio` {ratio}: more than this model can give; the smallest factors remove {most:.1%}{what}")


def too_small(ratio: float, above: float) -> ChoiceError:
    """The error for a ratio below the smallest removable share `above`."""
    return ChoiceError(f"`ratio` {ratio}: too small for this model; the smallest possible ratio is {above:.1%}")
