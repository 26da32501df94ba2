"""The allocation of ranks to projections, and the arithmetic of sizes and rounding that all rules share.

PGSVD (arXiv 2510.05544, section 4) minimises size and error together. With equal sensitivities the same relative error
in every layer is optimal, and ranks differ between layers (see `uniform`). With measured sensitivities the ranks
minimise the summed predicted loss for a given size or for a given GEMM latency (see `pareto`).
"""

from dataclasses import dataclass

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.schema import stored_size
from pgsvd_vllm.offline.model.projection import Projection

# Ranks are rounded up to a multiple of the hardware's tile size if both sides of the matrix are at least ROUND_FROM.
RANK_MULTIPLE = 16
ROUND_FROM = 256
# Largest difference between the requested and the removed share.
RATIO_SLACK = 0.005


@dataclass(frozen=True)
class Allocation:
    """Which projections are factored, and with what rank.

    Attributes:
        tolerances: tower -> bound on the relative output error of each of its projections; empty if sensitivities are
            measured or all projections have the same ratio.
        ranks: projection name -> rank; projections that stay dense are absent.
        removed: share of the projections' parameters that is removed, 0 to 1; ignored projections count as kept.
        loss: predicted loss, in nats per token, or with forward sensitivities as a share of the residual stream's
            energy; None if sensitivities are not measured.
        latency_removed: share of the projections' GEMM latency that is removed; None if ranks minimise size.
    """

    tolerances: dict[str, float]
    ranks: dict[str, int]
    removed: float
    loss: float | None = None
    latency_removed: float | None = None


def size(projection: Projection, rank: int, form: str) -> int:
    """Elements stored for a projection of a given rank and form, pivots included."""
    return stored_size(form, projection.out_features, projection.in_features, rank)


def saves(projection: Projection, rank: int, form: str) -> bool:
    """Whether a rank stores fewer elements than the dense weight, and is valid in the form."""
    fits = form != "pivot" or rank < projection.out_features
    return fits and size(projection, rank, form) < projection.numel


def hardware_rank(projection: Projection, rank: int) -> int:
    """The rank, rounded up to RANK_MULTIPLE if the weight has at least ROUND_FROM rows and columns.

    It is rounded up to the projection's own multiple, if it has one.
    """
    if projection.rank_multiple is not None:
        return -(-rank // projection.rank_multiple) * projection.rank_multiple
    if min(projection.out_features, projection.in_features) < ROUND_FROM:
        return rank
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def too_large(ratio: float, most: float, what: str = "") -> ChoiceError:
    """The error for a ratio above the largest removable share `most`, which is a share of `what`."""
    return ChoiceError(f"`ratio` {ratio}: more than this model can give; the smallest factors remove {most:.1%}{what}")


def too_small(ratio: float, above: float) -> ChoiceError:
    """The error for a ratio below the smallest removable share `above`."""
    return ChoiceError(f"`ratio` {ratio}: too small for this model; the smallest possible ratio is {above:.1%}")
