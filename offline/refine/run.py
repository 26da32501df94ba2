"""Runs knowledge distillation on the factors in the run's state and saves the result there."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch

from pgsvd_vllm.errors import as_interruption, reason_of
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.factors.solvers import relative_error
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import HELD_OUT, Dose
from pgsvd_vllm.offline.records import LayerFactors
from pgsvd_vllm.offline.refine.distill import Distiller, Tensors
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings


def refine_layers(
    source: ModelSource,
    data: CalibrationSet,
    settings: RunSettings,
    projections: ProjectionSet,
    state: RunState,
    say: Callable[[str], None],
) -> bool:
    """Train all factors together by `settings.dose`; `state.load_factors` then returns the result.

    Args:
        source: the language model.
        data: the calibration set; the first HELD_OUT windows of its remaining text select the result.
        settings: of the run, with `dose` set.
        projections: of the run.
        state: with the factors of every layer.
        say: called with one line at the end.

    Returns:
        Whether the factors were trained. Where the default amount fails it is left out, with a warning.

    Raises:
        InputError: a file of the state is damaged, or the models' predictions are not finite.
    """
    dose = settings.dose
    assert dose is not None
    layers = [state.load_factors(index) for index in range(len(projections.layers))]
    text = hashlib.sha256(data.windows.others.numpy().tobytes()).hexdigest()
    state.open_following({"minutes": dose.minutes, "tokens": dose.tokens, "seed": settings.seed, "text": text})
    if all(state.has_factors(index) for index in range(len(layers))):
        return True
    # The student's modules have the model's own names, which may differ from the checkpoint's.
    paths = {p.name: p.path for p in projections.flat}
    tensors: Tensors = {paths[name]: row for layer in layers for name, row in layer.tensors.items()}
    try:
        with as_interruption():
            trained = _distilled(source, data, settings, dose, tensors, say)
    except Exception as error:  # lack of memory, predictions that overflow, and what else transformers meets
        if not dose.by_default:
            raise
        say(f"WARNING: distillation is left out ({type(error).__name__}: {reason_of(error)})")
        state.leave_following()
        return False
    for index, layer in enumerate(layers):
        calibration = state.load_layer(index)
        reports = dict(layer.reports)
        for name in layer.tensors:
            weight = source.weights.tensor(f"{paths[name]}.weight").to(settings.device)
            gram = calibration.grams[calibration.leader[name]].double(settings.device)
            relative = relative_error(weight, gram, reconstruct(trained[paths[name]]).to(settings.device))
            reports[name] = replace(reports[name], error=relative)
        state.save_factors(index, LayerFactors({n: trained[paths[n]] for n in layer.tensors}, reports))
    return True


def _distilled(
    source: ModelSource,
    data: CalibrationSet,
    settings: RunSettings,
    dose: Dose,
    tensors: Tensors,
    say: Callable[[str], None],
) -> Tensors:
    """The factors after distillation."""
    windows = data.windows
    dense = source.whole(settings.device, settings.compute_dtype)
    # What is not trained is shared.
    student = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    distiller = Distiller(dense, student, source.towers[0].path, tensors, source.returned[0])
    # The factors overfit the windows they were fitted to, so training starts with the remaining ones.
    text = torch.cat([windows.others[HELD_OUT:], windows.ids])
    return distiller.run(text, windows.others[:HELD_OUT], dose, settings.seed, say).tensors
