"""Rounds all projections of a run, factored or dense, and saves the result in its state."""

from dataclasses import replace

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import INT8
from pgsvd_vllm.format.schema import DENSE, FactoredModule
from pgsvd_vllm.offline.factors.solvers import relative_error
from pgsvd_vllm.offline.linalg import naming
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.records import LayerFactors, ModuleReport
from pgsvd_vllm.offline.rounding.forms import round_projection
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings

# Projections with fewer outputs are not quantized.
LEAST_OUTPUTS = 16


def quantized_module(p: Projection, rank: int | None, settings: RunSettings) -> FactoredModule:
    """A projection's row of the module table.

    A matrix whose rows do not consist of whole groups is in INT8. Projections of few outputs keep their dtype: they are
    gates, and vLLM has no kernels for them.

    Args:
        p: the projection.
        rank: of its factors; None if it is not factored.
        settings: of the run, with `scheme` set.
    """
    assert settings.scheme is not None
    plain = FactoredModule(0, DENSE) if rank is None else FactoredModule(rank, settings.form)
    if p.out_features < LEAST_OUTPUTS:
        return plain
    shapes = plain.shapes(p.out_features, p.in_features)
    fits = {suffix: settings.scheme.fits(shapes[suffix][1]) for suffix in plain.matrices}
    return replace(plain, schemes={suffix: settings.scheme if fit else INT8 for suffix, fit in fits.items()})


def round_layers(source: ModelSource, settings: RunSettings, projections: ProjectionSet, state: RunState) -> None:
    """Quantize every projection by `settings.scheme`; `state.load_factors` then returns the result.

    Args:
        source: the model.
        settings: of the run, with `scheme` set.
        projections: of the run; those without factors have their dense weight quantized, ignored ones do not.
        state: with the factors of every layer.

    Raises:
        InputError: a projection's Gram matrix cannot be used, or a file of the state is damaged.
    """
    scheme = settings.scheme
    assert scheme is not None
    state.open_following({"scheme": scheme.section()})
    with tqdm(total=len(projections.flat), desc="quantize", unit="matrix") as bar:
        for index, row in enumerate(projections.layers):
            if state.has_factors(index):
                bar.update(len(row))
                continue
            layer = state.load_earlier(index)
            calibration = state.load_layer(index)
            found: dict[str, dict[str, torch.Tensor]] = {}
            reports: dict[str, ModuleReport] = {}
            for p in row:
                known = layer.tensors.get(p.name)
                report = layer.reports.get(p.name) or ModuleReport.dense(p.name, p.out_features, p.in_features)
                schemes = quantized_module(p, report.rank, settings).schemes
                bar.update()
                if not schemes:
                    found |= {} if known is None else {p.name: known}
                    reports[p.name] = report
                    continue
                weight = source.weights.tensor(f"{p.path}.weight").to(settings.device)
                gram = calibration.grams[calibration.leader[p.name]].double(settings.device)
                tensors = {s: t.to(settings.device) for s, t in (known or {"weight": weight}).items()}
                with naming(p.name):
                    found[p.name] = round_projection(tensors, gram, schemes)
                error = relative_error(weight, gram, reconstruct(dequantized(found[p.name], schemes)))
                reports[p.name] = replace(report, error=error)
            state.save_factors(index, LayerFactors(found, reports))
