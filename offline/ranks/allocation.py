"""From error profiles to ranks, by one uniform tolerance or by measured losses.

PGSVD (arXiv 2510.05544, section 4): with equal sensitivities, giving every layer the same relative
error is optimal for the bi-objective problem of size and error, and yields different ranks. With
measured sensitivities the same problem is: minimise the summed predicted loss for a given size, or for a
given time where it is known what each product costs.
"""

from dataclasses import dataclass

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.format.schema import stored_size
from pgsvd_vllm.offline.model.projection import Projection

# Ranks are rounded up to whole hardware tiles where the matrix is large enough not to feel it.
RANK_MULTIPLE = 16
ROUND_FROM = 256
RATIO_SLACK = 0.005


@dataclass(frozen=True)
class Allocation:
    """Which projections are factored, and with what rank.

    Attributes:
        tolerances: tower -> the uniform bound on every one of its projections' relative errors; empty where
            sensitivities were measured.
        ranks: projection name -> rank; a projection that stays dense is absent.
        removed: share of the projections' parameters that is removed, ignored ones counted as kept.
        loss: predicted, nats a token; None where sensitivities were not measured.
        time: share of the projections' time that is removed; None where ranks were chosen by size.
    """

    tolerances: dict[str, float]
    ranks: dict[str, int]
    removed: float
    loss: float | None = None
    time: float | None = None


def size(projection: Projection, rank: int, form: str) -> int:
    """Numbers stored for a projection with a rank in a form."""
    return stored_size(form, projection.out_features, projection.in_features, rank)


def saves(projection: Projection, rank: int, form: str) -> bool:
    """Whether a rank leaves fewer numbers than out * in."""
    fits = form != "pivot" or rank < projection.out_features
    return fits and size(projection, rank, form) < projection.numel


def hardware_rank(projection: Projection, rank: int) -> int:
    """The rank rounded up to RANK_MULTIPLE, for matrices of at least ROUND_FROM rows and columns."""
    if min(projection.out_features, projection.in_features) < ROUND_FROM:
        return rank
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def too_large(ratio: float, most: float, what: str = "") -> ChoiceError:
    """The error of a share that no ranks remove."""
    return ChoiceError(f"`ratio` {ratio}: more than this model can give; the smallest factors remove {most:.1%}{what}")


def too_small(ratio: float, above: float) -> ChoiceError:
    """The error of a share below the smallest step."""
    return ChoiceError(f"`ratio` {ratio}: too small for this model; the next possible step is {above:.1%}")
