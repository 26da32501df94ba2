"""The spectra of projections' outputs and losses, from sums over the calibration samples."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.calibration.gradients import ProjectionSums
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.linalg import GramSum, ScaledMatrix, gram_root, is_silent, naming, output_energy
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource

# A group of projections with the same input, and the sum of its Gram matrices.
Group = tuple[list[Projection], GramSum]


def output_spectra(
    source: ModelSource, device: torch.device, item: Group, _shared: None
) -> tuple[ScaledMatrix, dict[str, torch.Tensor]]:
    """The Gram matrix of a group of projections, and the spectra of their outputs.

    The weights are read one at a time, since those of a large layer may not fit into memory together.

    Returns:
        The matrix; projection -> eigenvalues of W C W^T, float64 [min(out, in)], descending. It lacks nonzero
        projections whose output is zero.
    """
    group, total = item
    gram = total.matrix().to(device)
    root: torch.Tensor | None = None
    found = {}
    for p in group:
        weight = source.weights.tensor(f"{p.path}.weight").to(device)
        with naming(p.name):
            if p.out_features > p.in_features and root is None:
                root = gram_root(gram)
            spectrum = output_energy(weight, gram, root)
        if not is_silent(float(weight.double().square().sum()), gram, spectrum):
            found[p.name] = spectrum.cpu()
    return ScaledMatrix.of(gram), found


@dataclass(frozen=True)
class LossSpectrum:
    """What the loss spectrum of a projection follows from.

    Attributes:
        projection: whose it is.
        gram: sum of x x^T over the calibration tokens.
        tokens: number of these tokens.
        sums: of the gradients; empty afterwards.
        gradient_tokens: that the layer has run backward.
        losses: number of loss terms.
        is_zero: whether the projection's weight is.
    """

    projection: Projection
    gram: ScaledMatrix
    tokens: int
    sums: ProjectionSums
    gradient_tokens: int
    losses: int
    is_zero: bool


def loss_spectrum(
    source: ModelSource, device: torch.device, item: LossSpectrum, _shared: None
) -> tuple[torch.Tensor, ScaledMatrix, ScaledMatrix] | None:
    """The eigenvalues of L^T W C W^T L of a projection, and its moments as they are stored.

    Returns:
        float64 [min(out, in)], descending, twice the loss of removing each direction in nats; G; C_w. None without
        gradient: only a zero projection has a known loss then, which is 0 at any rank.
    """
    p = item.projection
    moment, weighted = item.sums.moments(item.gradient_tokens, item.losses, device)
    if not (moment.any() or item.is_zero):
        return None
    gram = weighted_gram(item.gram.double(device), item.tokens, weighted)
    weight = source.weights.tensor(f"{p.path}.weight").to(device).double()
    with naming(p.name):
        energy = output_energy(metric_root(moment).T @ weight, gram).cpu()
    return energy, ScaledMatrix.of(moment), ScaledMatrix.of(weighted)
