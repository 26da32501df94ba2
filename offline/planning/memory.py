"""Estimates the peak memory of every stage of a run from shapes.

Stages follow each other, so that the run needs the largest of them. What all have in memory is counted once: torch and
transformers, the weights outside of the layers and the calibration text. benchmarks/compress_scale.py compares the
estimates with measurements.
"""

from collections.abc import Callable, Sequence

from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.calibration.lm_head import HEAD_ROWS
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS
from pgsvd_vllm.offline.linalg import upper_numel
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH, TOKENS_PER_CHUNK
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.towers import Tower
from pgsvd_vllm.offline.options import STEP_TOKENS
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.settings import MEASURED

# torch and transformers themselves.
PROGRAM_BYTES = 450 * 1024**2
# Matrices in float64 while LAPACK decomposes one: its copy, the result and the workspace.
DECOMPOSED = 5
# Names of the stages.
CALIBRATION, LM_HEAD, GRADIENTS = "calibration", "lm_head", "gradients"
FACTORS, DISTILLATION, QUANTIZATION = "factors", "distillation", "quantization"


def memory_bytes(plan: Plan) -> int:
    """Peak memory of a run in bytes."""
    return max(stage_bytes(plan).values())


def stage_bytes(plan: Plan) -> dict[str, int]:
    """Stage -> its peak memory in bytes, on the device that computes; stages that a run lacks are missing."""
    settings, head = plan.settings, plan.projections.lm_head
    found = {CALIBRATION: _shared(plan) + _calibration(plan)}
    if head is not None:
        found[LM_HEAD] = _shared(plan) + _lm_head(plan, head)
    if settings.sensitivity == MEASURED:
        found[GRADIENTS] = _shared(plan) + _gradients(plan)
    found[FACTORS] = factors_bytes(plan)
    if settings.dose is not None:
        found[DISTILLATION] = _shared(plan) + _distillation(plan)
    if settings.quantizes:
        found[QUANTIZATION] = _shared(plan) + _quantization(plan)
    return found


def _shared(plan: Plan) -> int:
    """What every stage has in memory: the program, the embeddings, an LM head where it is loaded, text, and the outputs
    of earlier towers.
    """
    settings, source = plan.settings, plan.source
    weights = source.vocabulary * _hidden(plan)
    if settings.sensitivity == MEASURED:
        weights += source.lm_head_numel  # for the gradients, and from then on
    weights += _earlier_states(plan)
    return PROGRAM_BYTES + weights * _width(plan) + (plan.data.nbytes if _on_cpu(plan) else 0)


def _calibration(plan: Plan) -> int:
    """Hidden states, a layer, its Gram matrices, and a batch or the spectra of a projection."""
    peaks = []
    for index, row in enumerate(plan.projections.layers):
        sizes = gram_sizes(row)
        batch = _layer_bytes(plan, index) + _batch_bytes(plan, row)
        # The Gram matrix of an input, and its root where projections have more outputs.
        spectra = max((_spectrum_bytes(p) + 8 * p.in_features**2 for p in row), default=0)
        spectra += 8 * max((p.in_features**2 for p in row if p.out_features > p.in_features), default=0)
        peaks.append(max(_sum_bytes(sizes) + batch, _total_bytes(sizes) + spectra))
    return _states(plan, lambda tokens: tokens) * _width(plan) + max(peaks, default=0)


def _lm_head(plan: Plan, head: Projection) -> int:
    """Hidden states, the LM head, its Gram matrices, blocks of its rows, and logits."""
    width = _width(plan)
    matrices = 6 * head.in_features**2 + 4 * HEAD_ROWS * head.in_features
    states = most_tokens(plan) * _hidden(plan) * width
    return states + head.numel * width + 8 * matrices + 4 * 4 * _logit_tokens(plan) * plan.source.vocabulary


def _gradients(plan: Plan) -> int:
    """The last hidden states, inputs and gradients of a layer, its moments, and a batch or the spectra."""
    most = GRADIENT_TOKENS + batch_tokens(plan)
    peaks = []
    for index, row in enumerate(plan.projections.layers):
        sizes = [size for p in row for size in (p.out_features, p.in_features)]
        batch = _layer_bytes(plan, index) + 3 * _batch_bytes(plan, row)
        spectra = 4 * sum(upper_numel(n) for n in gram_sizes(row))
        spectra += max((_loss_spectrum_bytes(p) for p in row), default=0)
        peaks.append(max(_sum_bytes(sizes) + batch, _total_bytes(sizes) + spectra))
    start = 3 * 4 * _logit_tokens(plan) * plan.source.vocabulary
    return _states(plan, lambda tokens: tokens + 2 * min(tokens, most)) * _width(plan) + max(*peaks, start)


def factors_bytes(plan: Plan) -> int:
    """Peak memory of the layer-by-layer fit, or of the fit of a projection at a time, in bytes."""
    settings, width, on_cpu = plan.settings, _width(plan), _on_cpu(plan)
    fitted = fitted_tokens(plan)
    kept = fitted if settings.kept_tokens is None else settings.kept_tokens
    peaks = []
    for index, row in enumerate(plan.projections.layers):
        memory = max((_fit_bytes(p, settings.sequential) for p in row), default=0)
        if on_cpu:
            memory += 4 * sum(upper_numel(n) for n in gram_sizes(row))
            if settings.sensitivity == MEASURED:
                memory += 4 * sum(upper_numel(p.out_features) + upper_numel(p.in_features) for p in row)
        if settings.sequential:
            # Where passes are repeated, a second copy of the layer.
            layers = _layer_bytes(plan, index) * (1 if kept == fitted else 2)
            memory += kept * _fit_features(plan, row) * width + layers + _batch_bytes(plan, row)
        peaks.append(memory)
    states = 0
    if settings.sequential:
        # Hidden states of the dense model before and after the layer, and of the factored one; and the outputs of
        # earlier towers of the factored model, as those of the dense one.
        states = _states(plan, lambda tokens: 3 * min(tokens, SEQUENTIAL_TOKENS)) + _earlier_states(plan)
    return _shared(plan) + states * width + max(peaks, default=0)


def _fit_features(plan: Plan, row: list[Projection]) -> int:
    """Elements per token that the layer-by-layer fit keeps of a layer: at its first projection all dense inputs, at its
    last one those of one projection and what the paused forward pass holds, the inputs and two residual streams among
    them. Dense inputs and outputs are on the CPU; inputs of MoE experts are not kept.
    """
    hidden, sizes = _hidden(plan), gram_sizes([p for p in row if p.reach == 1])
    largest = max(sizes, default=0)
    if not _on_cpu(plan):
        return largest + 3 * hidden
    return max(sum(sizes) + 4 * hidden, 2 * largest + 5 * hidden)


def _distillation(plan: Plan) -> int:
    """The model, float32 parameters with Adam's two moments, a gradient, the stored forms, and activations."""
    settings, rows, flat = plan.settings, plan.projections.layers, plan.projections.flat
    width, vocabulary = _width(plan), plan.source.vocabulary
    # Tokens of a step.
    length = plan.data.length
    length = max(length, min(STEP_TOKENS // length * length, plan.data.windows.trained))
    ratio, by_bits = plan.target.ratio, settings.quantizes and plan.target.itemsizes is not None
    removed = ratio if isinstance(ratio, float) and plan.latencies is None and not by_bits else 0.0
    kept = round((1 - removed) * sum(p.numel for p in flat))
    largest = max(p.numel for p in flat)
    memory = plan.source.weights.numel * width + 12 * kept + 2 * 4 * largest
    if _on_cpu(plan):
        # The factors from before, and the best ones so far.
        memory += 2 * kept * (settings.store_dtype or plan.source.weight_dtype).itemsize
    assert settings.dose is not None
    if settings.dose.more_than(plan.data.windows.trained):
        memory += plan.data.windows.trained * _hidden(plan) * width  # the dense model's hidden states
    features = max(_row_features(row) for row in rows)
    return memory + 2 * len(rows) * length * features * width + 6 * 4 * min(length, TOKENS_PER_CHUNK) * vocabulary


def _quantization(plan: Plan) -> int:
    """A layer's matrices, and copies of a Gram matrix: its Cholesky factor and that of its inverse among them."""
    peaks = []
    for row in plan.projections.layers:
        square = max((p.in_features**2 for p in row), default=0)
        stored = 4 * sum(upper_numel(n) for n in gram_sizes(row)) if _on_cpu(plan) else 0
        peaks.append(stored + 7 * 8 * square + sum(p.numel for p in row) * _width(plan))
    return max(peaks, default=0)


def _width(plan: Plan) -> int:
    """Bytes of an element in the compute dtype."""
    return plan.settings.compute_dtype.itemsize


def _states(plan: Plan, tokens: Callable[[int], int]) -> int:
    """Elements of the hidden states of the tower that has most of them.

    Args:
        plan: of the run.
        tokens: the tokens that count, from those of a tower.
    """
    return max(tokens(plan.data.tokens_of(tower.name)) * _tower_width(plan, i) for i, tower in _towers(plan))


def _earlier_states(plan: Plan) -> int:
    """Elements of the outputs of all towers but the last, which are kept."""
    return sum(plan.data.tokens_of(tower.name) * _tower_width(plan, i) for i, tower in _towers(plan)[:-1])


def _towers(plan: Plan) -> list[tuple[int, Tower]]:
    """The towers with the indexes of their first layers."""
    return [(span.start, tower) for span, tower in zip(plan.source.spans, plan.source.towers, strict=True)]


def _tower_width(plan: Plan, start: int) -> int:
    """Width of the hidden states of a tower, the inputs of its first projection."""
    rows = (plan.projections.layers[index] for index in plan.source.span(start))
    return next((row[0].in_features for row in rows if row), _hidden(plan))


def _hidden(plan: Plan) -> int:
    """Width of the language model's hidden states."""
    hidden: int = plan.source.config.get_text_config().hidden_size
    return hidden


def _on_cpu(plan: Plan) -> bool:
    """Whether what the CPU holds counts."""
    return plan.settings.device.type == "cpu"


def _layer_bytes(plan: Plan, index: int) -> int:
    """Bytes of a layer in the compute dtype, with what is not factored, such as MoE experts."""
    return sum(parameter.numel() for parameter in plan.source.layers[index].parameters()) * _width(plan)


def batch_tokens(plan: Plan) -> int:
    """Tokens of the largest batch of text."""
    return min(max(TOKENS_PER_BATCH, plan.data.length), most_tokens(plan))


def _logit_tokens(plan: Plan) -> int:
    """Tokens whose logits are in memory together: those of a batch with images, else a few."""
    return plan.data.length if plan.source.reads_images else min(plan.data.length, TOKENS_PER_CHUNK)


def _batch_bytes(plan: Plan, row: list[Projection]) -> int:
    """Bytes of one batch inside of a layer: inputs and outputs of the projections, and rows in float32."""
    widest = max((max(p.in_features, p.out_features) for p in row), default=0)
    return batch_tokens(plan) * (_row_features(row) * _width(plan) + 8 * widest)


def _total_bytes(sizes: Sequence[int]) -> int:
    """Bytes of sums of Gram matrices over all batches: upper triangles in float64."""
    return 8 * sum(upper_numel(size) for size in sizes)


def _sum_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the same while they are summed: those of a block of batches in float32 come on top."""
    return _total_bytes(sizes) + 4 * sum(upper_numel(size) for size in sizes)


def _spectrum_bytes(p: Projection) -> int:
    """Bytes of the spectrum of a projection's output."""
    squares = DECOMPOSED * min(p.in_features, p.out_features) ** 2 + p.in_features**2
    return 8 * (squares + 2 * p.numel)


def _loss_spectrum_bytes(p: Projection) -> int:
    """Bytes of the spectrum of a projection's loss: of its output, G and C_w, the mixed matrix and the root of G."""
    return _spectrum_bytes(p) + 8 * (2 * p.in_features**2 + (1 + DECOMPOSED) * p.out_features**2)


def _fit_bytes(p: Projection, sequential: bool) -> int:
    """Bytes of the fit of a projection: its target and Gram matrices, and a decomposition."""
    target = 3 * p.in_features**2 + 2 * p.numel
    squares = DECOMPOSED * max(min(p.in_features, p.out_features) ** 2, p.in_features**2 if sequential else 0)
    return 8 * (target + max(squares, DECOMPOSED * p.out_features**2) + 2 * p.numel)


def _row_features(row: list[Projection]) -> int:
    """Elements per token of the inputs and outputs of a layer; MoE experts count by their reach."""
    return round(sum(p.reach * (p.out_features + p.in_features) for p in row))


def most_tokens(plan: Plan) -> int:
    """Tokens of the tower with the most tokens."""
    return max(plan.data.tokens_of(tower.name) for tower in plan.source.towers)


def fitted_tokens(plan: Plan) -> int:
    """Tokens of the layer-by-layer fit; 0 without it."""
    return min(most_tokens(plan), SEQUENTIAL_TOKENS) if plan.settings.sequential else 0


def layer_inputs(row: list[Projection]) -> list[tuple[Projection, int]]:
    """The distinct inputs of a layer with their sizes, as far as names and shapes show them.

    Neighbouring projections of one module share an input if its size is the same, but for the module's last one where
    it leads back to that size, such as o_proj.
    """
    found: list[tuple[Projection, int]] = []
    for i, p in enumerate(row):
        parent = p.path.rpartition(".")[0]
        is_last = i + 1 == len(row) or row[i + 1].path.rpartition(".")[0] != parent
        known = found[-1] if found else None
        shares = known is not None and known[1] == p.in_features and known[0].path.rpartition(".")[0] == parent
        if not shares or (is_last and p.out_features == p.in_features):
            found.append((p, p.in_features))
    return found


def gram_sizes(row: list[Projection]) -> list[int]:
    """The sizes of a layer's Gram matrices."""
    return [size for _, size in layer_inputs(row)]
