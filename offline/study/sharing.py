"""What one down factor for all projections of one input (q, k, v; gate, up) would cost."""

import torch

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.linalg import gram_root, naming, output_energy, spectrum
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.settings import MEASURED
from pgsvd_vllm.offline.study.rows import SHARING, Row
from pgsvd_vllm.offline.study.study import Study

FORMS = ("factors", "pivot")


def sharing_rows(study: Study) -> list[Row]:
    """Predicted loss of the best ranks with one down factor a group, as a multiple of that with one a projection.

    A model whose projections all have inputs of their own has one row, without a value.
    """
    apart = dict(study.loss)
    together: dict[str, torch.Tensor] = {}
    groups: dict[str, list[Projection]] = {}
    for index, row in enumerate(study.plan.projections.layers):
        leaders = study.state.load_layer(index, with_grams=False).leader
        own: dict[str, list[Projection]] = {}
        for p in row:
            own.setdefault(leaders[p.name], []).append(p)
        own = {leader: group for leader, group in own.items() if len(group) > 1}
        groups |= own
        for leader, energies in _joint_energies(study, index, own).items():
            together[leader], of_each = energies
            apart |= of_each
    if not groups:
        return [Row(SHARING, "no two projections share an input", None)]
    shared = {p.name for group in groups.values() for p in group}
    others = [p for p in study.projections if p.name not in shared]
    joint = [
        Projection(leader, sum(p.out_features for p in group), group[0].in_features) for leader, group in groups.items()
    ]
    energies_of_joint = {name: energy for name, energy in apart.items() if name not in shared} | together
    rows: list[Row] = []
    for form in FORMS:
        separate, joined = study.front(apart, form), study.front(energies_of_joint, form, others + joint)
        for ratio in sorted({*study.ratios, study.ratio}):
            try:
                shared_loss, least = (front.at(ratio).loss for front in (joined, separate))
            except ChoiceError as error:
                study.say(f"WARNING: {SHARING}: {error}")
                continue
            value = shared_loss / least if shared_loss is not None and least else None
            case = f"one down factor a group, {form}, {ratio:.0%} removed, predicted loss, multiple of apart"
            rows.append(Row(SHARING, case, value, form, ratio))
    return rows


def _joint_energies(
    study: Study, index: int, groups: dict[str, list[Projection]]
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The energies of each group of a layer as one matrix, and of its projections.

    Both are by one second moment of the shared inputs, the mean of those that the gradients of each projection weight.

    Args:
        study: with the calibration.
        index: of the layer.
        groups: leader -> projections with one input.
    """
    if not groups:
        return {}
    data, device = study.state.load_layer(index), study.plan.settings.device
    sensitivity = study.state.load_sensitivity(index, MEASURED)
    found = {}
    for leader, group in groups.items():
        gram = data.grams[leader].double(device)
        inputs = torch.stack(
            [weighted_gram(gram, data.tokens, sensitivity.grams[p.name].double(device)) for p in group]
        ).mean(0)
        with naming(leader):
            root = gram_root(inputs)
            targets = {
                p.name: metric_root(sensitivity.moments[p.name].double(device)).T @ study.weight(p) for p in group
            }
            energies = {name: output_energy(target, inputs, root).cpu() for name, target in targets.items()}
            half = torch.cat(list(targets.values())) @ root
            joint = spectrum(half.T @ half if len(half) > half.shape[1] else half @ half.T).cpu()
        found[leader] = joint, energies
    return found
