"""What the stages of a compression hand on, a layer at a time: calibration, sensitivities, factors, report rows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModuleReport:
    """One projection's outcome.

    Attributes:
        rank: None where it stays dense.
        error: relative output error of the stored factors on the calibration inputs.
        optimum: smallest possible error at this rank.
        sweeps: ALS sweeps taken.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    error: float
    optimum: float
    sweeps: int


@dataclass(frozen=True)
class LMHeadCalibration:
    """What calibration finds of the head.

    Attributes:
        gram: float32 [in, in], C = sum of x x^T.
        weight: float32 [out], mean of p (1 - p) over the tokens.
        energy: float64 [in], descending eigenvalues of S C S^T.
    """

    gram: torch.Tensor
    weight: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class LMHeadFactors:
    """The head as it will be stored.

    Attributes:
        name: in the checkpoint.
        tensors: by suffix; none where it stays dense, since factors of that tolerance would be larger.
        report: its row of the report.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    report: ModuleReport


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration keeps of one layer.

    Attributes:
        grams: leader -> float32 [in, in], sum of x x^T.
        leader: projection -> leader of its input.
        energy: projection -> float64 eigenvalues of W C W^T, descending.
        tokens: that ran the layer.
        counts: leader -> tokens that were summed.
    """

    grams: dict[str, torch.Tensor]
    leader: dict[str, str]
    energy: dict[str, torch.Tensor]
    tokens: int
    counts: dict[str, int]


@dataclass(frozen=True)
class LayerSensitivity:
    """What the measurement of sensitivities keeps of one layer.

    Attributes:
        moments: projection -> G float32 [out, out]; empty where no gradients were taken, as grams then are.
        grams: projection -> C_w float32 [in, in].
        energy: projection -> float64, descending: twice what cutting each direction costs. Nats a token
            (eigenvalues of L^T W C W^T L), or shares of the residual stream's energy without gradients.
    """

    moments: dict[str, torch.Tensor]
    grams: dict[str, torch.Tensor]
    energy: dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerFactors:
    """The result for one layer.

    Attributes:
        tensors: projection -> suffix -> tensor as it will be stored.
        reports: projection -> its row of the report.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    reports: dict[str, ModuleReport]
