"""Turns chosen ranks into the tensors of every layer, kept in the run's state as they are finished."""

import math

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.factors.baselines import norm_of
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS, ErrorAwarePass, Target
from pgsvd_vllm.offline.factors.solvers import als, closed_form, relative_error
from pgsvd_vllm.offline.factors.stored_form import stored_form
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
    ranks: dict[str, int],
) -> None:
    """Factor every projection that has a rank; `state.load_factors` then gives the result.

    Args:
        source: the model.
        data: the calibration set, for the error-aware fit.
        settings: of the run.
        projections: calibrated; `state` holds their calibration.
        state: that keeps the factors as each layer is finished.
        ranks: projection name -> rank.

    Raises:
        InputError: factors that are not finite in the stored dtype.
    """
    state.open_factors(
        {
            "ranks": ranks,
            "form": settings.form,
            "sequential": settings.sequential,
            "sensitivity": settings.sensitivity,
            "baseline": settings.baseline,
            "dtype": str(settings.store_dtype),
        }
    )
    layers = range(len(projections.layers))
    if all(state.has_factors(index) for index in layers):
        return
    walk = None
    if settings.sequential:
        batches = data.batches(SEQUENTIAL_TOKENS)
        stream = LayerStream(source, batches, settings.device, settings.compute_dtype)
        walk = ErrorAwarePass(stream, whole=sum(b["input_ids"].numel() for b in batches) == data.tokens)
    with tqdm(total=len(ranks), desc="factorize", unit="matrix") as bar:
        for index in layers:
            bar.set_postfix_str(f"layer {index + 1}/{len(layers)}")
            layer = _Layer(source, settings, state, ranks, projections.layers[index], index)
            done = state.has_factors(index)
            if walk is not None:
                known = {name: reconstruct(row) for name, row in layer.tensors.items()}
                for _ in walk.advance(index, layer.groups(), set(layer.ranked), layer.fit, known):
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
    """One layer's factors as they come; those that are on disk already are there from the start."""

    def __init__(
        self,
        source: ModelSource,
        settings: RunSettings,
        state: RunState,
        ranks: dict[str, int],
        row: list[Projection],
        index: int,
    ) -> None:
        self.source, self.settings, self.ranks, self.row = source, settings, ranks, row
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.reports: dict[str, ModuleReport] = {}
        self.ranked = {p.name: p for p in row if p.name in ranks}
        self.data: LayerCalibration = state.load_layer(index)
        self.moments: dict[str, torch.Tensor] = {}
        self.weighted: dict[str, torch.Tensor] = {}
        if state.has_factors(index):
            stored = state.load_factors(index)
            self.tensors, self.reports = stored.tensors, stored.reports
        elif settings.measured and self.ranked:
            found = state.load_sensitivity(index, settings.sensitivity)
            self.moments, self.weighted = found.moments, found.grams

    def groups(self) -> list[list[Projection]]:
        """The projections that read one input together, in the order of their calls."""
        called = list(self.data.leader)
        groups: dict[str, list[Projection]] = {}
        for p in sorted(self.row, key=lambda p: called.index(p.name)):
            groups.setdefault(self.data.leader[p.name], []).append(p)
        return list(groups.values())

    def gram(self, p: Projection) -> torch.Tensor:
        """The dense model's Gram matrix of a projection's input, float64."""
        return self.data.grams[self.data.leader[p.name]].to(self.settings.device).double()

    def fit(self, p: Projection, wanted: Target | None) -> torch.Tensor:
        """Factor one projection and keep its tensors; returns their product [out, in], float64.

        Args:
            p: the projection.
            wanted: what to fit, and on which inputs; None for the weight on the dense model's inputs.
        """
        rank, settings = self.ranks[p.name], self.settings
        stored = self.source.weights.tensor(f"{p.path}.weight")
        weight = stored.to(settings.device).double()
        target, gram = weight, self.gram(p)
        if wanted is not None:
            target = wanted.of(weight)
            # All of the calibration text, moved as far as the tokens that took part in the layer-by-layer pass were.
            gram = wanted.gram if wanted.dense is None else gram + (wanted.gram - wanted.dense)
        if p.name in self.weighted:
            gram = weighted_gram(gram, self.data.tokens, self.weighted[p.name].to(settings.device))
        optimum = float(error_profile(self.data.energy[p.name])[min(rank, len(self.data.energy[p.name]))])
        moment = self.moments.get(p.name)
        metric = None if moment is None else metric_root(moment.to(settings.device))
        if settings.baseline is not None:
            gram = norm_of(settings.baseline, gram)
            factors = closed_form(target, gram, rank)
        elif metric is None and not settings.sequential:
            factors = als(target, gram, rank, optimum)
        else:
            factors = closed_form(target, gram, rank, metric)
        tensors = stored_form(factors, target, gram, settings.form, settings.store_dtype or stored.dtype, metric)
        whole = reconstruct(tensors)
        error = relative_error(weight, self.gram(p), whole)
        if not math.isfinite(error) or not torch.isfinite(whole).all():
            dtype = settings.store_dtype or stored.dtype
            raise InputError(f"{p.name}: its factors are not finite in {dtype}; use `dtype` float32 or bfloat16")
        self.tensors[p.name] = {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
        sweeps = len(factors.errors) - 1
        self.reports[p.name] = ModuleReport(p.name, p.out_features, p.in_features, rank, error, optimum, sweeps)
        return whole
