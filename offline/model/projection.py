"""A projection, which is a dense linear layer that can be factored, and the set of projections of one run."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from pgsvd_vllm.offline.model.towers import LANGUAGE, PROJECTOR

# The LM head belongs to no tower: this takes the place of its tower's name.
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Projection:
    """A dense linear layer that can be factored.

    Attributes:
        name: module name in the checkpoint, without `.weight`.
        out_features, in_features: shape of its weight.
        module: its module path in the transformers model if that differs from `name`, else empty.
        tower: name of the tower that it belongs to.
        reach: expected share of the tower's tokens that it sees; below 1 for a routed MoE expert.
    """

    name: str
    out_features: int
    in_features: int
    module: str = ""
    tower: str = LANGUAGE
    reach: float = 1.0

    @property
    def path(self) -> str:
        """Its module path in the transformers model."""
        return self.module or self.name

    @property
    def numel(self) -> int:
        """Parameters of its dense weight."""
        return self.out_features * self.in_features

    @property
    def may_lack_tokens(self) -> bool:
        """Whether it may see fewer tokens than it has inputs and then stays dense: an MoE expert or the projector."""
        return self.reach < 1 or self.tower == PROJECTOR


@dataclass(frozen=True)
class ProjectionSet:
    """The projections of one run, by layer.

    Attributes:
        layers: the projections to factor, one list for each layer of the model; lists may be empty.
        ignored: projections that stay dense and count as kept: the user ignores them, or too few tokens reach them.
        unused: projections of layers whose outputs the model ignores or which the calibration data does not reach.
        lm_head: the LM head if it is compressed as well, else None.
    """

    layers: list[list[Projection]]
    ignored: list[Projection] = field(default_factory=list)
    unused: list[Projection] = field(default_factory=list)
    lm_head: Projection | None = None

    @property
    def flat(self) -> list[Projection]:
        """All projections to factor, in order."""
        return [p for row in self.layers for p in row]

    @property
    def towers(self) -> list[str]:
        """The names of the towers with projections to factor."""
        return list(dict.fromkeys(p.tower for p in self.flat))

    @property
    def every(self) -> list[Projection]:
        """The projections to factor and the ignored ones."""
        return [*self.flat, *self.ignored]

    @property
    def numel(self) -> int:
        """Parameters of the projections to factor and of the ignored ones."""
        return sum(p.numel for p in self.every)

    @property
    def ignored_numel(self) -> int:
        """Parameters of the ignored projections."""
        return sum(p.numel for p in self.ignored)

    def of_tower(self, tower: str) -> "ProjectionSet":
        """The projections of one tower, without unused ones and the LM head."""
        layers = [[p for p in row if p.tower == tower] for row in self.layers]
        return ProjectionSet(layers, [p for p in self.ignored if p.tower == tower])

    def kept_dense(self, left_out: Collection[Projection]) -> "ProjectionSet":
        """The set with the projections in `left_out` moved to the ignored ones."""
        layers = [[p for p in row if p not in left_out] for row in self.layers]
        return replace(self, layers=layers, ignored=[*self.ignored, *left_out])


def widest(projections: Sequence[Projection]) -> Projection | None:
    """The projection with the most inputs; None for an empty sequence."""
    return max(projections, key=lambda p: p.in_features, default=None)
