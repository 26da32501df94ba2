"""How far other rules for ranks are from the Pareto front: one uniform tolerance, and forward passes alone."""

from pgsvd_vllm.errors import ChoiceError
from pgsvd_vllm.offline.calibration.gram import advance
from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH, Batch, text_batches
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.study.rows import FORWARD, FRONT, Row
from pgsvd_vllm.offline.study.study import Study, multiple

# Distance of the removed share from the requested one.
RATIO_BAR = 0.005
SQUARED, PREDICTED, DISTANCE = "squared errors", "predicted loss", "distance of the removed share"


def front_rows(study: Study) -> list[Row]:
    """Loss of one uniform tolerance at every size as a multiple of the front's.

    The loss is the paper's surrogate, the sum of squared relative errors, and the predicted loss. Sizes that the model
    cannot give are left out with a warning.
    """
    # Half of the tail beyond r is then half the squared relative error. The output of a zero projection is 0.
    relative = {name: energy / energy.sum().clamp_min(1e-300) for name, energy in study.output.items()}
    compared = [(SQUARED, relative, study.front(relative)), (PREDICTED, study.loss, study.front(study.loss))]
    rows: list[Row] = []
    for ratio in study.ratios:
        try:
            uniform = study.uniform(ratio)
        except ChoiceError as error:
            study.say(f"WARNING: {FRONT}: {error}")
            continue
        for what, energies, front in compared:
            case = f"one tolerance, {ratio:.0%} removed, {what}, multiple of the front"
            rows.append(Row(FRONT, case, multiple(uniform, energies, front), what, ratio))
        case = f"one tolerance, {ratio:.0%} removed, {DISTANCE}"
        rows.append(Row(FRONT, case, abs(uniform.removed - ratio), DISTANCE, ratio, RATIO_BAR))
    return rows


def forward_rows(study: Study) -> list[Row]:
    """Predicted loss of the ranks that forward passes alone would choose, as a multiple of the front's."""
    settings = study.plan.settings
    stream = LayerStream(study.plan.source, _batches(study.plan), settings.device, settings.compute_dtype)
    guessed = {}
    for index, row in enumerate(study.plan.projections.layers):
        stream.enter(index, stream.flow)
        moved = noise_responses(stream, index, row, settings.seed)
        list(advance(stream, index, row, collect=False))
        guessed.update({p.name: study.output[p.name] * moved.get(p.name, 0.0) for p in row})
    front, crude = (study.front(energies, "pivot") for energies in (study.loss, guessed))
    rows: list[Row] = []
    for ratio in study.ratios:
        try:
            value = multiple(crude.at(ratio), study.loss, front)
        except ChoiceError as error:
            study.say(f"WARNING: {FORWARD}: {error}")
            continue
        case = f"ranks by forward passes, {ratio:.0%} removed, {PREDICTED}, multiple of the front"
        rows.append(Row(FORWARD, case, value, PREDICTED, ratio))
    return rows


def _batches(plan: Plan) -> list[Batch]:
    """One batch of the calibration set, which noise responses are measured on; windows from all over a text."""
    if plan.data.pairs is not None:
        return plan.data.batches(TOKENS_PER_BATCH)
    ids = plan.data.windows.ids
    return text_batches(ids[:: max(1, ids.numel() // TOKENS_PER_BATCH)])
