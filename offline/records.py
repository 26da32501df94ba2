"""The records that the stages of a compression exchange, one layer at a time."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.linalg import ScaledMatrix


@dataclass(frozen=True)
class ModuleReport:
    """How one projection was factored.

    Attributes:
        name: of the projection in the checkpoint.
        out_features, in_features: shape of its weight.
        rank: of its factors; None if it stays dense.
        error: relative output error of the stored factors, ||(W - UV) X||_F / ||W X||_F on the calibration activations.
        optimum: smallest possible relative output error at this rank.
        sweeps: ALS sweeps; 0 for a closed-form solution.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    error: float
    optimum: float
    sweeps: int

    @classmethod
    def dense(cls, name: str, out_features: int, in_features: int) -> "ModuleReport":
        """The report of a projection that stays as it is."""
        return cls(name, out_features, in_features, None, 0.0, 0.0, 0)


@dataclass(frozen=True)
class LMHeadCalibration:
    """The calibration of the LM head.

    Attributes:
        gram: float32 [in, in], C = sum of x x^T over the tokens, divided by a power of two.
        weight: float32 [vocabulary], mean of p (1 - p) over the tokens, p being the model's probabilities.
        energy: float64 [in], eigenvalues of S C S^T in descending order, C being `gram` and S [vocabulary, in] the
            weighted rows.
    """

    gram: torch.Tensor
    weight: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class LMHeadFactors:
    """The LM head as the checkpoint will store it.

    Attributes:
        name: of the module in the checkpoint.
        tensors: suffix -> tensor; empty if the LM head stays dense because factors would be larger.
        report: its row of the report.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    report: ModuleReport


@dataclass(frozen=True)
class LayerCalibration:
    """The calibration of one layer.

    Projections with the same input (q, k, v; gate, up) share one Gram matrix. It bears the name of the first of them,
    their leader.

    Attributes:
        grams: leader -> C = sum of x x^T, [in, in].
        leader: projection -> leader of its input.
        energy: projection -> eigenvalues of W C W^T, float64 [min(out, in)], descending. It lacks projections that too
            few tokens reach, and nonzero ones whose output is zero on the calibration data.
        tokens: tokens that run through the layer.
        counts: leader -> tokens in its sum.
    """

    grams: dict[str, ScaledMatrix]
    leader: dict[str, str]
    energy: dict[str, torch.Tensor]
    tokens: int
    counts: dict[str, int]


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivities of one layer (see `calibration.gradients` and `calibration.noise_response`).

    Attributes:
        moments: projection -> G, [out, out]; empty if sensitivities come from forward passes.
        grams: projection -> C_w, [in, in]; empty if sensitivities come from forward passes.
        energy: projection -> twice the predicted loss of removing each direction, float64 [min(out, in)], descending.
            With gradients these are the eigenvalues of L^T W C W^T L, in nats per token; without gradients they are
            shares of the residual stream's energy. It lacks projections on which the loss does not depend.
    """

    moments: dict[str, ScaledMatrix]
    grams: dict[str, ScaledMatrix]
    energy: dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer.

    Attributes:
        tensors: projection -> suffix -> tensor as the checkpoint will store it (see `format.schema.form_shapes`).
        reports: projection -> its row of the report.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    reports: dict[str, ModuleReport]
