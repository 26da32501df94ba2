"""Factors all layers with the chosen ranks and saves the tensors of each layer in the run's state."""

import math
from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.calibration.loss_metric import FIT_DAMPING, FIT_INPUT_DAMPING, metric_root, weighted_gram
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.factors.baselines import norm_of
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS, ErrorAwarePass, Target
from pgsvd_vllm.offline.factors.solvers import als, closed_form, relative_error
from pgsvd_vllm.offline.factors.stored_form import not_finite, stored_form
from pgsvd_vllm.offline.linalg import ScaledMatrix, naming
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.records import LayerCalibration, LayerFactors, ModuleReport
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings


def factor_layers(
    source: ModelSource,
    data: CalibrationSet,
    settings: RunSettings,
    projections: ProjectionSet,
    state: RunState,
    modules: Mapping[str, FactoredModule],
) -> None:
    """Factor every projection of a table that has a rank; `state.load_factors` then returns the result.

    Layers that the state already holds for the same choice are not factored again.

    Args:
        source: the model.
        data: the calibration set, for the error-aware fit.
        settings: of the run.
        projections: to factor.
        state: with their calibration; it receives the factors of each finished layer.
        modules: projection name -> its row of the module table, whose rank is from 1 to min(out, in).

    Raises:
        InputError: factors are not finite in the stored dtype, activations overflow in the compute dtype, a factored
            layer calls a projection with other tokens than the dense layer, or a file of the state is damaged.
    """
    factored = {name: module for name, module in modules.items() if not module.is_dense}
    state.open_factors(
        {
            "ranks": {name: [module.rank, module.form] for name, module in factored.items()},
            "sequential": settings.sequential,
            "sensitivity": settings.sensitivity,
            "baseline": settings.baseline,
            "dtype": str(settings.store_dtype),
        }
    )
    layers = range(len(projections.layers))
    if all(state.has_factors(index) for index in layers):
        return
    error_aware = None
    if settings.sequential:
        batches = data.batches(SEQUENTIAL_TOKENS)
        stream = LayerStream(source, batches, settings.device, settings.compute_dtype)
        complete = sum(batch["input_ids"].numel() for batch in batches) == data.tokens
        error_aware = ErrorAwarePass(stream, complete, settings.kept_tokens)
    with tqdm(total=len(factored), desc="factorize", unit="matrix") as bar:
        for index in layers:
            bar.set_postfix_str(f"layer {index + 1}/{len(layers)}", refresh=False)
            layer = _Layer(source, settings, state, factored, projections.layers[index], index)
            done = state.has_factors(index)
            if error_aware is not None:
                known = {name: reconstruct(row) for name, row in layer.tensors.items()}
                for _ in error_aware.advance(index, layer.groups(), set(layer.ranked), layer.fit, known):
                    bar.update()
            elif not done:
                for p in layer.ranked.values():
                    layer.fit(p, None)
                    bar.update()
            if done:
                bar.update(len(layer.tensors))
            else:
                state.save_factors(index, LayerFactors(layer.tensors, layer.reports))


class _Layer:
    """The factors of one layer; those of a finished layer are read from the state."""

    def __init__(
        self,
        source: ModelSource,
        settings: RunSettings,
        state: RunState,
        modules: Mapping[str, FactoredModule],
        row: list[Projection],
        index: int,
    ) -> None:
        self.source, self.settings, self.modules, self.row = source, settings, modules, row
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.reports: dict[str, ModuleReport] = {}
        self.ranked = {p.name: p for p in row if p.name in modules}
        self.data: LayerCalibration = state.load_layer(index)
        self.moments: dict[str, ScaledMatrix] = {}
        self.weighted: dict[str, ScaledMatrix] = {}
        if state.has_factors(index):
            stored = state.load_factors(index)
            self.tensors, self.reports = stored.tensors, stored.reports
        elif settings.measured and self.ranked:
            found = state.load_sensitivity(index, settings.sensitivity)
            self.moments, self.weighted = found.moments, found.grams

    def groups(self) -> list[list[Projection]]:
        """The projections grouped by input, in the order in which the layer calls them."""
        called = list(self.data.leader)
        groups: dict[str, list[Projection]] = {}
        for p in sorted(self.row, key=lambda p: called.index(p.name)):
            groups.setdefault(self.data.leader[p.name], []).append(p)
        return list(groups.values())

    def gram(self, p: Projection) -> torch.Tensor:
        """The dense model's Gram matrix of a projection's input, float64 [in, in]."""
        return self.data.grams[self.data.leader[p.name]].double(self.settings.device)

    def fit(self, p: Projection, error_aware: Target | None) -> torch.Tensor:
        """Factor one projection and keep its tensors.

        Args:
            p: the projection.
            error_aware: target and inputs of the fit; None for the dense weight on the dense model's inputs.

        Returns:
            The reconstructed weight, float64 [out, in].

        Raises:
            InputError: the factors are not finite in the stored dtype.
        """
        rank, form, settings = self.modules[p.name].rank, self.modules[p.name].form, self.settings
        stored = self.source.weights.tensor(f"{p.path}.weight")
        weight = stored.to(settings.device).double()
        target, gram = weight, self.gram(p)
        if error_aware is not None:
            target = error_aware.of(weight)
            # The Gram matrix of all calibration tokens plus the shift C' - C of those in the error-aware pass.
            gram = error_aware.gram if error_aware.dense is None else gram + (error_aware.gram - error_aware.dense)
        if p.name in self.weighted:
            weighted = self.weighted.pop(p.name).double(settings.device)
            gram = weighted_gram(gram, self.data.tokens, weighted, FIT_INPUT_DAMPING)
        optimum = float(error_profile(self.data.energy[p.name])[min(rank, len(self.data.energy[p.name]))])
        moment = self.moments.pop(p.name, None)  # each is needed once, and large
        dtype = settings.store_dtype or stored.dtype
        with naming(p.name):
            metric = None if moment is None else metric_root(moment.double(settings.device), FIT_DAMPING)
            if settings.baseline is not None:
                gram = norm_of(settings.baseline, gram)
                factors = closed_form(target, gram, rank)
            elif metric is None and not settings.sequential:
                factors = als(target, gram, rank, optimum)
            else:
                factors = closed_form(target, gram, rank, metric)
            tensors = stored_form(factors, target, gram, form, dtype, metric)
        reconstructed = reconstruct(tensors)
        error = relative_error(weight, self.gram(p), reconstructed)
        if not math.isfinite(error) or not is_finite(reconstructed):
            raise not_finite(p.name, dtype)
        self.tensors[p.name] = {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
        sweeps = len(factors.errors) - 1
        self.reports[p.name] = ModuleReport(p.name, p.out_features, p.in_features, rank, error, optimum, sweeps)
        return reconstructed
