"""Rounds all projections of a run, factored or dense, and saves the result in its state."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.factors.solvers import relative_error
from pgsvd_vllm.offline.linalg import naming
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.records import LayerFactors, ModuleReport
from pgsvd_vllm.offline.rounding.forms import round_projection
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings


def round_layers(
    source: ModelSource,
    settings: RunSettings,
    projections: ProjectionSet,
    state: RunState,
    modules: Mapping[str, FactoredModule],
) -> None:
    """Quantize the matrices that have a scheme, factors or dense; `state.load_factors` then returns the result.

    Args:
        source: the model.
        settings: of the run.
        projections: of the run.
        state: with the factors of every layer.
        modules: projection name -> its row of the module table.

    Raises:
        InputError: a projection's Gram matrix cannot be used, or a file of the state is damaged.
    """
    table = {name: module.schemes for name, module in modules.items() if module.schemes}
    state.open_following({name: {s: scheme.key for s, scheme in own.items()} for name, own in table.items()})
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
                schemes = table.get(p.name)
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
