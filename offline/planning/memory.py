"""Estimates the peak memory of every stage of a run from shapes.

Stages follow each other, so that the run needs the largest of them. What all have in memory is counted once: torch and
transformers, the weights outside of the layers and the calibration text. benchmarks/compress_scale.py compares the
estimates with measurements.
"""

from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.calibration.lm_head import HEAD_ROWS
from pgsvd_vllm.offline.calibration.loss import TOKENS_PER_CHUNK
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH
from pgsvd_vllm.offline.model.projection import Projection
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
    """Stage -> its peak memory in bytes; stages that a run lacks are missing."""
    settings, source = plan.settings, plan.source
    width, hidden = settings.compute_dtype.itemsize, source.config.get_text_config().hidden_size
    shared = PROGRAM_BYTES + source.vocabulary * hidden * width + plan.data.nbytes
    # The outputs of earlier towers are kept.
    shared += sum(plan.data.tokens_of(tower.name) for tower in source.towers[:-1]) * hidden * width
    found = {CALIBRATION: shared + _calibration(plan)}
    head = plan.projections.lm_head
    if head is not None:
        matrices = 6 * head.in_features**2 + 4 * HEAD_ROWS * head.in_features  # Gram matrices, blocks of rows
        found[LM_HEAD] = shared + head.numel * width + 8 * matrices
    if settings.sensitivity == MEASURED:
        shared += source.lm_head_numel * width  # loaded from here on
        found[GRADIENTS] = shared + _gradients(plan)
    found[FACTORS] = shared + _factors(plan)
    if settings.dose is not None:
        found[DISTILLATION] = shared + _distillation(plan)
    if settings.quantizes:
        square = max((p.in_features**2 for p in plan.projections.flat if p.reach == 1), default=0)
        # A Gram matrix, its Cholesky factor and that of its inverse among them.
        found[QUANTIZATION] = shared + _layer(plan) + 7 * square * 8
    return found


def _calibration(plan: Plan) -> int:
    """Hidden states, a layer, its Gram matrices, and a batch or the spectra of a projection."""
    tokens, hidden = most_tokens(plan), plan.source.config.get_text_config().hidden_size
    peaks = []
    for row in plan.projections.layers:
        grams = 8 * sum(n * n for n in gram_sizes(row))
        batch = _layer_bytes(plan, row) + _batch_bytes(plan, row)
        peaks.append(grams + max(batch, *(_spectrum_bytes(p) for p in row), 0))
    return tokens * hidden * plan.settings.compute_dtype.itemsize + max(peaks, default=0)


def _gradients(plan: Plan) -> int:
    """The last hidden states, inputs and gradients of a layer, its moments, and a batch or the spectra."""
    width, hidden = plan.settings.compute_dtype.itemsize, plan.source.config.get_text_config().hidden_size
    tokens = most_tokens(plan)
    measured = min(tokens, GRADIENT_TOKENS + TOKENS_PER_BATCH)
    peaks = []
    for row in plan.projections.layers:
        moments = 8 * sum(p.out_features**2 + p.in_features**2 for p in row)
        spectra = 4 * sum(n * n for n in gram_sizes(row)) + max((_loss_spectrum_bytes(p) for p in row), default=0)
        peaks.append(moments + max(_layer_bytes(plan, row) + 3 * _batch_bytes(plan, row), spectra))
    # Logits of a few tokens, or of a batch with images: themselves, their gradient and the predictions.
    logits = plan.data.length if plan.source.reads_images else min(plan.data.length, TOKENS_PER_CHUNK)
    start = 3 * logits * plan.source.vocabulary * 4
    return (tokens + 2 * measured) * hidden * width + max(*peaks, start)


def _factors(plan: Plan) -> int:
    """The layer-by-layer fit, or a projection at a time."""
    settings, hidden = plan.settings, plan.source.config.get_text_config().hidden_size
    width = settings.compute_dtype.itemsize
    fitted = fitted_tokens(plan)
    kept = fitted if settings.kept_tokens is None else settings.kept_tokens
    # The outputs of earlier towers of the factored model, as those of the dense one.
    towers = sum(plan.data.tokens_of(tower.name) for tower in plan.source.towers[:-1]) if settings.sequential else 0
    peaks = []
    for row in plan.projections.layers:
        matrices = 4 * sum(n * n for n in gram_sizes(row))
        if settings.sensitivity == MEASURED:
            matrices += 4 * sum(p.out_features**2 + p.in_features**2 for p in row)
        temporary = max((_fit_bytes(p, settings.sequential) for p in row), default=0)
        if settings.sequential:
            # The dense inputs, and as much in the paused forward passes; inputs of MoE experts are not kept.
            features = 2 * sum(gram_sizes([p for p in row if p.reach == 1]))
            # Where passes are repeated, a second copy of the layer.
            layers = _layer_bytes(plan, row) * (1 if kept == fitted else 2)
            temporary += kept * features * width + layers + _batch_bytes(plan, row)
        peaks.append(matrices + temporary)
    # Hidden states of the dense model before and after the layer, and of the factored one.
    return (3 * fitted + towers) * hidden * width + max(peaks, default=0)


def _distillation(plan: Plan) -> int:
    """The model, and float32 parameters with Adam's two moments and the gradient of one of them."""
    settings, rows, flat = plan.settings, plan.projections.layers, plan.projections.flat
    width, hidden = settings.compute_dtype.itemsize, plan.source.config.get_text_config().hidden_size
    # Tokens of a step.
    length = plan.data.length
    length = max(length, min(STEP_TOKENS // length * length, plan.data.windows.trained))
    ratio, by_bits = plan.target.ratio, settings.quantizes and plan.target.itemsizes is not None
    removed = ratio if isinstance(ratio, float) and plan.latencies is None and not by_bits else 0.0
    kept = round((1 - removed) * sum(p.numel for p in flat))
    memory = plan.source.weights.numel * width + 12 * kept + 4 * max(p.numel for p in flat)
    assert settings.dose is not None
    if settings.dose.more_than(plan.data.windows.trained):
        memory += plan.data.windows.trained * hidden * width  # the dense model's hidden states
    return memory + 2 * len(rows) * length * _features(plan) * width + 4 * length * plan.source.vocabulary * 4


def _layer(plan: Plan) -> int:
    """Bytes of the largest layer's projections."""
    return max(_layer_bytes(plan, row) for row in plan.projections.layers)


def _layer_bytes(plan: Plan, row: list[Projection]) -> int:
    """Bytes of a layer's projections in the compute dtype."""
    return sum(p.numel for p in row) * plan.settings.compute_dtype.itemsize


def _batch_bytes(plan: Plan, row: list[Projection]) -> int:
    """Bytes of one batch inside of a layer: inputs and outputs of the projections, and rows in float32."""
    tokens = min(TOKENS_PER_BATCH, most_tokens(plan))
    widest = max((max(p.in_features, p.out_features) for p in row), default=0)
    return tokens * (_row_features(row) * plan.settings.compute_dtype.itemsize + 8 * widest)


def _spectrum_bytes(p: Projection) -> int:
    """Bytes of the spectrum of a projection's output."""
    squares = DECOMPOSED * min(p.in_features, p.out_features) ** 2 + p.in_features**2
    return 8 * (squares + 2 * p.numel)


def _loss_spectrum_bytes(p: Projection) -> int:
    """Bytes of the spectrum of a projection's loss: of its output, and the root of G."""
    return _spectrum_bytes(p) + 8 * (p.in_features**2 + DECOMPOSED * p.out_features**2)


def _fit_bytes(p: Projection, sequential: bool) -> int:
    """Bytes of the fit of a projection: its target and Gram matrices, and a decomposition."""
    target = 3 * p.in_features**2 + 2 * p.numel
    squares = DECOMPOSED * max(min(p.in_features, p.out_features) ** 2, p.in_features**2 if sequential else 0)
    return 8 * (target + max(squares, DECOMPOSED * p.out_features**2) + 2 * p.numel)


def _features(plan: Plan) -> int:
    """Elements per token of the inputs and outputs of the widest layer."""
    return max(_row_features(row) for row in plan.projections.layers)


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
    """The distinct inputs of a layer with their sizes; neighbouring projections of equal size share one."""
    found: list[tuple[Projection, int]] = []
    for p in row:
        if not found or found[-1][1] != p.in_features:
            found.append((p, p.in_features))
    return found


def gram_sizes(row: list[Projection]) -> list[int]:
    """The sizes of a layer's Gram matrices."""
    return [size for _, size in layer_inputs(row)]
