"""A dense linear layer that may be factored."""

from dataclasses import dataclass

from pgsvd_vllm.offline.model.towers import LANGUAGE, PROJECTOR

# In place of a tower's name.
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Projection:
    """A dense linear layer that may be factored.

    Attributes:
        name: module name in the checkpoint, without `.weight`.
        out_features, in_features: shape of its weight.
        module: its path in the model, where transformers has another one than the checkpoint.
        tower: name of the tower that it belongs to.
        reach: share of the tokens that it is expected to see: less than 1 of an expert of a mixture.
    """

    name: str
    out_features: int
    in_features: int
    module: str = ""
    tower: str = LANGUAGE
    reach: float = 1.0

    @property
    def path(self) -> str:
        """Its module path in the model."""
        return self.module or self.name

    @property
    def scarce(self) -> bool:
        """Whether the calibration data may well be too little for it, and it then stays dense."""
        return self.reach < 1 or self.tower == PROJECTOR

    @property
    def numel(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features
