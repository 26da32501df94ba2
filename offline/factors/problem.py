"""The fit of one projection: what it follows from, and its solution in the stored form."""

import math
from dataclasses import dataclass

import torch

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.calibration.loss_metric import FIT_DAMPING, FIT_INPUT_DAMPING, metric_root, weighted_gram
from pgsvd_vllm.offline.factors.baselines import norm_of
from pgsvd_vllm.offline.factors.error_aware import Target
from pgsvd_vllm.offline.factors.solvers import als, closed_form, relative_error
from pgsvd_vllm.offline.factors.stored_form import not_finite, stored_form
from pgsvd_vllm.offline.linalg import ScaledMatrix, naming
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.settings import RunSettings


@dataclass(frozen=True)
class FitProblem:
    """What the factors of a projection follow from, beside its weight and a target of the error-aware fit.

    Attributes:
        projection: to factor.
        module: its row of the module table.
        gram: of the dense model's inputs, the sum over all calibration tokens.
        tokens: number of these tokens.
        energy: the spectrum of its output, float64 [min(out, in)].
        moment: G; None without gradients.
        weighted: C_w; None without gradients.
    """

    projection: Projection
    module: FactoredModule
    gram: ScaledMatrix
    tokens: int
    energy: torch.Tensor
    moment: ScaledMatrix | None
    weighted: ScaledMatrix | None


def solve(
    source: ModelSource, device: torch.device, problem: FitProblem, shared: tuple[RunSettings, Target | None]
) -> tuple[dict[str, torch.Tensor], ModuleReport, torch.Tensor]:
    """Factor one projection.

    Args:
        source: the model.
        device: that computes.
        problem: of the projection.
        shared: the settings of the run, and the target of the error-aware fit; None for the dense weight on the dense
            model's inputs.

    Returns:
        suffix -> tensor in the stored form; the report; the reconstructed weight [out, in] in the compute dtype.

    Raises:
        InputError: the factors are not finite in the stored dtype.
    """
    settings, target = shared
    p, rank, form = problem.projection, problem.module.rank, problem.module.form
    stored = source.weights.tensor(f"{p.path}.weight")
    weight = stored.to(device).double()
    dense = problem.gram.double(device)
    matrix, gram = weight, dense
    if target is not None:
        matrix = target.of(weight)
        gram = target.gram.to(device)
        # The Gram matrix of all calibration tokens plus the shift C' - C of those in the error-aware pass.
        gram = gram if target.dense is None else dense + (gram - target.dense.to(device))
    if problem.weighted is not None:
        gram = weighted_gram(gram, problem.tokens, problem.weighted.double(device), FIT_INPUT_DAMPING)
    optimum = float(error_profile(problem.energy)[min(rank, len(problem.energy))])
    dtype = settings.store_dtype or stored.dtype
    with naming(p.name):
        metric = None if problem.moment is None else metric_root(problem.moment.double(device), FIT_DAMPING)
        if settings.baseline is not None:
            gram = norm_of(settings.baseline, gram)
            factors = closed_form(matrix, gram, rank)
        elif metric is None and not settings.sequential:
            factors = als(matrix, gram, rank, optimum)
        else:
            factors = closed_form(matrix, gram, rank, metric)
        tensors = stored_form(factors, matrix, gram, form, dtype, metric)
    reconstructed = reconstruct(tensors)
    error = relative_error(weight, dense, reconstructed)
    if not math.isfinite(error) or not is_finite(reconstructed):
        raise not_finite(p.name, dtype)
    report = ModuleReport(p.name, p.out_features, p.in_features, rank, error, optimum, len(factors.errors) - 1)
    stored_tensors = {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
    return stored_tensors, report, reconstructed.to(settings.compute_dtype)
