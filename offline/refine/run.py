"""Heals the factors that the workspace holds, and keeps the result there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pgsvd_vllm.format.lowrank import product
from pgsvd_vllm.offline.factors.solvers import relative_error
from pgsvd_vllm.offline.options import HELD_OUT
from pgsvd_vllm.offline.records import LayerFactors
from pgsvd_vllm.offline.refine.distill import Distiller, Tensors
from pgsvd_vllm.offline.run.plan import Plan
from pgsvd_vllm.offline.run.state import RunState


def refine_layers(plan: Plan, workspace: RunState, say: Callable[[str], None]) -> None:
    """Train all factors together for `plan.options.refine` minutes; `workspace.load_factors` then gives the result.

    Args:
        plan: with `refine` set.
        workspace: has the factors of every layer.
        say: called with one line at the end.
    """
    layers = [workspace.load_factors(index) for index in range(len(plan.projections))]
    assert plan.options.refine is not None
    workspace.open_refined({"minutes": plan.options.refine, "seed": plan.options.seed})
    if all(workspace.has_factors(index) for index in range(len(layers))):
        return
    tensors: Tensors = {}
    for layer in layers:
        tensors.update(layer.tensors)
    windows = plan.windows
    healer = Distiller(_model(plan), _model(plan), plan.source.towers[0].path, tensors)
    # The factors know the windows they were fitted on by heart: others teach them more.
    text = torch.cat([windows.others[HELD_OUT:], windows.ids])
    refined = healer.run(text, windows.others[:HELD_OUT], plan.options.refine, plan.options.seed, say)
    paths = {p.name: p.path for p in plan.flat}
    for index, layer in enumerate(layers):
        data = workspace.load_layer(index)
        reports = dict(layer.reports)
        for name in layer.tensors:
            weight, gram = plan.source.tensor(f"{paths[name]}.weight"), data.grams[data.leader[name]]
            error = relative_error(weight, gram, product(refined.tensors[name]))
            reports[name] = replace(reports[name], error=error)
        workspace.save_factors(index, LayerFactors({n: refined.tensors[n] for n in layer.tensors}, reports))


def _model(plan: Plan) -> Any:
    """The dense model, whole, where and how calibration computed."""
    model: Any = plan.source.auto_class.from_pretrained(
        plan.source.folder, dtype=plan.compute_dtype, trust_remote_code=plan.options.trust_remote_code
    )
    return model.to(plan.device)
