"""Measures every layer, and keeps the results in the workspace: Gram matrices, spectra, sensitivities."""

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gradients import GradientPass, LayerGradients
from pgsvd_vllm.offline.calibration.gram import LayerGrams, advance
from pgsvd_vllm.offline.calibration.lm_head import calibrate_lm_head
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.linalg import gram_root, output_energy
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.records import LayerCalibration, LayerSensitivity
from pgsvd_vllm.offline.run.plan import Plan
from pgsvd_vllm.offline.run.state import RunState


def calibrate_layers(plan: Plan, workspace: RunState) -> None:
    """Gram matrices, output spectra and sensitivities of every layer that the workspace does not have yet."""
    layers, kind = len(plan.projections), plan.sensitivity
    missing = [index for index in range(layers) if plan.measured and not workspace.has_sensitivity(index, kind)]
    done = all(workspace.has_layer(i) for i in range(layers)) and (plan.head is None or workspace.has_head())
    if done and not missing:
        return
    stream = LayerStream(plan.source, plan.batches(), plan.device, plan.compute_dtype)
    gradients = GradientPass(stream, workspace.folder / "inputs") if missing and kind == "measured" else None
    with tqdm(total=_tokens_of_all(plan), unit="tok", unit_scale=True, desc="calibrate") as bar:
        for index, row in enumerate(plan.projections):
            collect = bool(row) and not workspace.has_layer(index)
            bar.set_postfix_str(f"layer {index + 1}/{layers}")
            stream.enter(index, stream.flow)
            if gradients is not None:
                gradients.remember(index)
            answers = kind == "forward" and index in missing
            moved = noise_responses(stream, index, row, plan.options.seed) if answers else {}
            for step in advance(stream, index, row, collect):
                if isinstance(step, LayerGrams):
                    _check_tokens(plan, row, step.tokens)
                    workspace.save_layer(index, _calibration(plan, row, step))
                else:
                    bar.update(step)
            if not row and not workspace.has_layer(index):
                workspace.save_layer(index, LayerCalibration({}, {}, {}, 0, {}))
            if answers:
                data = workspace.load_layer(index, with_grams=False)
                scaled = {
                    name: energy * (moved[name] / data.tokens) for name, energy in data.energy.items() if name in moved
                }
                workspace.save_sensitivity(index, kind, LayerSensitivity({}, {}, scaled))
    if plan.head is not None and not workspace.has_head():
        workspace.save_head(calibrate_lm_head(stream, plan.head))
    if gradients is not None:
        _measure_sensitivity(plan, workspace, gradients)


def _tokens_of_all(plan: Plan) -> int:
    """Of all layers."""
    return sum(len(tower.layers) * plan.tokens_of(tower.name) for tower in plan.source.towers)


def _check_tokens(plan: Plan, row: list[Projection], tokens: int) -> None:
    widest = max((p for p in row if not p.scarce), key=lambda p: p.in_features, default=None)
    if widest is not None and tokens < widest.in_features:
        raise InputError(
            f"--dataset {plan.data_name}: {tokens} tokens of the {widest.tower} model are too little; "
            f"{widest.name} has {widest.in_features} inputs and needs at least as many"
        )


def _measure_sensitivity(plan: Plan, workspace: RunState, gradients: GradientPass) -> None:
    """The backward pass: gradient moments and predicted losses of every layer."""
    gradients.start(plan.options.seed)
    layers = len(plan.projections)
    share = gradients.batches / len(gradients.stream.batches)
    with tqdm(total=round(share * _tokens_of_all(plan)), unit="tok", unit_scale=True, desc="gradients") as bar:
        for index in reversed(range(layers)):
            bar.set_postfix_str(f"layer {index + 1}/{layers}")
            known = workspace.load_layer(index, with_grams=False).energy
            for step in gradients.retreat(index, [p for p in plan.projections[index] if p.name in known]):
                if isinstance(step, int):
                    bar.update(step)
                else:
                    workspace.save_sensitivity(index, plan.sensitivity, _loss_spectra(plan, workspace, index, step))


def _loss_spectra(plan: Plan, workspace: RunState, index: int, found: LayerGradients) -> LayerSensitivity:
    """Eigenvalues of L^T W C W^T L for a layer's projections: twice what cutting each one loses."""
    data = workspace.load_layer(index)
    energy = {}
    for p in plan.projections[index]:
        if p.name not in found.moments:
            continue
        gram = data.grams[data.leader[p.name]].to(plan.device)
        gram = weighted_gram(gram, data.tokens, found.grams[p.name])
        target = metric_root(found.moments[p.name]).T @ plan.source.tensor(f"{p.path}.weight").to(plan.device).double()
        energy[p.name] = output_energy(target, gram).cpu()
    return LayerSensitivity(found.moments, found.grams, energy)


def _calibration(plan: Plan, row: list[Projection], found: LayerGrams) -> LayerCalibration:
    """With the output energies of a layer's projections, but for those that too few tokens reach.

    One projection at a time, since those of a large layer do not fit together.
    """
    roots: dict[str, torch.Tensor] = {}
    energy = {}
    for p in row:
        name = found.leader.get(p.name, "")
        if p.scarce and found.counts.get(name, 0) < p.in_features:
            continue
        gram = found.grams[name].to(plan.device).double()
        if p.out_features > p.in_features and name not in roots:
            roots[name] = gram_root(gram)
        weight = plan.source.tensor(f"{p.path}.weight").to(plan.device)
        energy[p.name] = output_energy(weight, gram, roots.get(name)).cpu()
    used = {found.leader[name] for name in energy}
    grams = {name: gram for name, gram in found.grams.items() if name in used}
    return LayerCalibration(grams, found.leader, energy, found.tokens, found.counts)
