"""Estimates memory, disk and time of a run, and changes or refuses a plan that does not fit."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.calibration.lm_head import HEAD_ROWS
from pgsvd_vllm.offline.data.sampled.self_text import Sampling
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH
from pgsvd_vllm.offline.model.device import gemm_rate
from pgsvd_vllm.offline.model.free_memory import free_memory
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.options import STEP_TOKENS
from pgsvd_vllm.offline.planning.dose import FLOPS_PER_PARAMETER
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.settings import FORWARD, MEASURED

# ALS sweeps per projection at the default tolerance.
TYPICAL_SWEEPS = 12
# Time of a step of distillation as a multiple of that of its GEMMs at full speed.
DISTILLATION_SLOWDOWN = 2.0


@dataclass(frozen=True)
class Estimate:
    """The resources that a run needs.

    Attributes:
        memory: peak memory in bytes.
        disk: peak disk space in bytes.
        seconds: run time.
    """

    memory: int
    disk: int
    seconds: float


def memory_bytes(plan: Plan) -> int:
    """Peak memory of a run in bytes, computed from shapes."""
    source, settings, rows, flat = plan.source, plan.settings, plan.projections.layers, plan.projections.flat
    tokens, hidden = _most_tokens(plan), source.config.get_text_config().hidden_size
    width = settings.compute_dtype.itemsize
    layer = max(sum(p.numel for p in row) for row in rows) * width
    embeddings = source.vocabulary * hidden * width
    widest = max(max(p.in_features, p.out_features) for p in flat)
    # Elements of one Gram matrix of the error-aware fit, which holds seven in float64.
    square = max((p.in_features**2 for p in flat if p.reach == 1), default=0)
    # Copies of a Gram matrix while a matrix is rounded, its Cholesky factor and that of its inverse among them.
    quantized = 7 if settings.quantizes else 0
    # The outputs of earlier towers are kept, dense and, in the error-aware fit, factored.
    kept = sum(plan.data.tokens_of(tower.name) for tower in source.towers[:-1]) * (2 if settings.sequential else 1)
    memory = (
        layer + embeddings + tokens * hidden * width
        + max(sum(n * n for n in _gram_sizes(row)) for row in rows) * 8
        + min(TOKENS_PER_BATCH, tokens) * widest * 8
        + max(4 * widest * min(widest, 4096), (7 if settings.sequential else quantized) * square) * 8
        + kept * hidden * width
        + plan.data.nbytes
        + 400 * 1024**2  # torch and transformers themselves
    )  # fmt: skip
    head = plan.projections.lm_head
    if settings.sensitivity == MEASURED:
        memory += max(sum(p.out_features**2 + p.in_features**2 for p in row) for row in rows) * 8
        memory += 3 * _activation_bytes(plan, width)
        memory += 0 if head is not None else source.lm_head_numel * width
    fitted = min(tokens, SEQUENTIAL_TOKENS) if settings.sequential else 0
    # The factored hidden states, the dense inputs of the layer's projections, and as much in the paused forward passes;
    # inputs of MoE experts are not kept.
    paused = max(sum(_gram_sizes([p for p in row if p.reach == 1])) for row in rows)
    memory += fitted * (hidden + 2 * paused) * width
    if head is not None:
        # The LM head, and Gram matrices and blocks of rows in float64.
        memory += head.numel * width + 6 * head.in_features**2 * 8 + HEAD_ROWS * head.in_features * 8 * 4
    if settings.dose is not None:
        # The model, and float32 parameters with Adam's two moments and the gradient of one of them.
        # Tokens of a step.
        length = plan.data.length
        length = max(length, min(STEP_TOKENS // length * length, plan.data.windows.trained))
        ratio, by_bits = plan.target.ratio, settings.quantizes and plan.target.itemsizes is not None
        removed = ratio if isinstance(ratio, float) and plan.latencies is None and not by_bits else 0.0
        kept = round((1 - removed) * sum(p.numel for p in flat))
        memory += source.weights.numel * width + 12 * kept + 4 * max(p.numel for p in flat)
        if settings.dose.more_than(plan.data.windows.trained):
            memory += plan.data.windows.trained * hidden * width  # the dense model's hidden states
        memory += 2 * len(rows) * length * _features(plan) * width + 4 * length * source.vocabulary * 4
    return memory


def estimate(plan: Plan) -> Estimate:
    """Peak memory, disk and time; the time follows from a short measurement of this machine's speed."""
    settings, rows, flat = plan.settings, plan.projections.layers, plan.projections.flat
    tokens = _most_tokens(plan)
    fitted = min(tokens, SEQUENTIAL_TOKENS) if settings.sequential else 0
    dtypes = {settings.compute_dtype, torch.float32, torch.float64}
    rates = {dtype: gemm_rate(dtype, settings.device) for dtype in dtypes}
    # Parameters that a token runs through; only some MoE experts are among them.
    active = sum(p.reach * p.numel for p in flat)
    squares = sum(p.reach * n * n for row in rows for p, n in _inputs(row))
    seconds = 2 * tokens * active / rates[settings.compute_dtype] + 2 * tokens * squares / rates[torch.float32]
    if settings.sensitivity == MEASURED:
        backward = min(tokens, GRADIENT_TOKENS)
        seconds += 4 * backward * active / rates[settings.compute_dtype]
        moments = sum(p.reach * (p.out_features**2 + p.in_features**2) for p in flat)
        seconds += 2 * backward * moments / rates[torch.float32]
    if settings.sequential:
        # Every layer runs dense and factored. Every input gets D, C' and, unless all tokens take part, C; half of the
        # symmetric C' and C is computed.
        seconds += 2 * 2 * fitted * active / rates[settings.compute_dtype]
        seconds += (3 if fitted == tokens else 4) * fitted * squares / rates[torch.float32]
    if settings.dose is not None:
        trained = settings.dose.tokens or 0
        flops = FLOPS_PER_PARAMETER * trained * plan.source.weights.numel
        seconds += 60 * (settings.dose.minutes or 0) + DISTILLATION_SLOWDOWN * flops / rates[settings.compute_dtype]
    eigen = _eigenvector_rate(settings.device)
    # Where bits are chosen, each scheme is tried on the dense weight first.
    tried = sum(storage.scheme is not None for storage in settings.storages) if settings.chooses_bits else 0
    for p in flat:
        small = min(p.out_features, p.in_features)
        seconds += (2 * p.in_features * p.numel + TYPICAL_SWEEPS * 4 * small**3) / rates[torch.float64]
        seconds += small**3 / eigen
        if settings.quantizes:
            seconds += (1 + tried) * 4 * p.in_features * (p.numel + p.in_features**2) / rates[torch.float64]
    sampling = plan.data.to_sample or Sampling(0.0, 0)
    return Estimate(max(memory_bytes(plan), sampling.memory), disk_bytes(plan), seconds + sampling.seconds)


def disk_bytes(plan: Plan) -> int:
    """Peak disk space in bytes: calibration results, layer inputs while gradients are measured, factors from before
    distillation and quantization, and the checkpoint.
    """
    rows = plan.projections.layers
    needed = sum(n * n for row in rows for n in _gram_sizes(row)) * 4
    if plan.settings.sensitivity == MEASURED:
        tokens = min(_most_tokens(plan), GRADIENT_TOKENS + TOKENS_PER_BATCH)
        hidden = plan.source.config.get_text_config().hidden_size
        needed += sum(p.out_features**2 + p.in_features**2 for p in plan.projections.flat) * 4
        needed += tokens * hidden * plan.settings.compute_dtype.itemsize * len(rows)
    # The factors from before distillation, and those from before quantization, are kept.
    stages = (plan.settings.dose is not None) + plan.settings.quantizes
    needed += stages * sum(plan.source.weights.header(f"{p.path}.weight").nbytes for p in plan.projections.flat)
    return needed + plan.source.weights.nbytes


def _most_tokens(plan: Plan) -> int:
    """Tokens of the tower with the most tokens."""
    return max(plan.data.tokens_of(tower.name) for tower in plan.source.towers)


def _needed(plan: Plan) -> int:
    """Bytes that the plan still has to allocate: the weights outside of the layers are loaded already."""
    return memory_bytes(plan) - sum(p.nbytes for p in plan.source.model.parameters() if not p.is_meta)


def fit_distillation(plan: Plan, say: Callable[[str], None]) -> Plan:
    """The plan, or one without distillation if that does not fit into memory and nobody has asked for it.

    Args:
        plan: to fit.
        say: called with one line if the plan changes.
    """
    free, needed = free_memory(plan.settings.device), _needed(plan)
    if free is None or needed <= free or plan.settings.dose is None or not plan.settings.dose.by_default:
        return plan
    say(
        f"WARNING: distillation needs about {bytes_text(needed)} of memory, {bytes_text(free)} are free: it is left out"
    )
    return plan.without_distillation()


def fit_into_memory(plan: Plan, say: Callable[[str], None]) -> Plan:
    """The plan, or one with sensitivities from forward passes alone if gradients do not fit into memory.

    Only the default changes; a sensitivity that the user requested is kept.

    Args:
        plan: to fit.
        say: called with one line if the plan changes.
    """
    free = free_memory(plan.settings.device)
    if free is None or plan.options.sensitivity is not None or plan.settings.sensitivity != MEASURED:
        return plan
    needed = _needed(plan)
    if needed <= free:
        return plan
    say(
        f"WARNING: measuring loss gradients needs about {bytes_text(needed)} of memory, {bytes_text(free)} are free: "
        "sensitivities come from forward passes alone, which is less accurate (`sensitivity` measured forces gradients)"
    )
    return plan.with_sensitivity(FORWARD)


def _activation_bytes(plan: Plan, width: int) -> int:
    """Bytes of the largest activations of one batch: the logits of a window, or the activations inside a layer."""
    batch = min(TOKENS_PER_BATCH, _most_tokens(plan))
    return max(plan.data.length * plan.source.vocabulary * 4, batch * _features(plan) * width)


def _features(plan: Plan) -> int:
    """Elements per token of the inputs and outputs of the widest layer; MoE experts count by their reach."""
    return max(round(sum(p.reach * (p.out_features + p.in_features) for p in row)) for row in plan.projections.layers)


def _inputs(row: list[Projection]) -> list[tuple[Projection, int]]:
    """The distinct inputs of a layer with their sizes; neighbouring projections of equal size share one."""
    found: list[tuple[Projection, int]] = []
    for p in row:
        if not found or found[-1][1] != p.in_features:
            found.append((p, p.in_features))
    return found


def _gram_sizes(row: list[Projection]) -> list[int]:
    """The sizes of a layer's Gram matrices."""
    return [size for _, size in _inputs(row)]


def _eigenvector_rate(device: torch.device, size: int = 512) -> float:
    """The measured rate n^3 / seconds of an n x n eigendecomposition; on GPUs it is 1/100 of the GEMM rate."""
    a = torch.randn(size, size, dtype=torch.float64, device=device)
    a = a + a.T
    torch.linalg.eigh(a)
    start = time.perf_counter()
    torch.linalg.eigh(a).eigenvalues.sum().item()
    return size**3 / (time.perf_counter() - start)


def check_disk(plan: Plan, needed: int, folder: Path) -> None:
    """Refuse to start if the disk is too small; raises InputError.

    Args:
        plan: of the run.
        needed: bytes.
        folder: on the disk that is checked.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"`output_dir` {plan.options.output}: needs about {bytes_text(needed)} of disk space during the run, "
            f"{bytes_text(free)} are free"
        )
