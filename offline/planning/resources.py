"""Estimates memory, disk and time of a run, and refuses a plan that does not fit onto the disk."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.data.sampled.self_text import Sampling
from pgsvd_vllm.offline.linalg import upper_numel
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH
from pgsvd_vllm.offline.model.device import gemm_rate
from pgsvd_vllm.offline.planning.dose import FLOPS_PER_PARAMETER
from pgsvd_vllm.offline.planning.memory import fitted_tokens, gram_sizes, layer_inputs, memory_bytes, most_tokens
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.settings import MEASURED

# ALS sweeps per projection at the default tolerance.
TYPICAL_SWEEPS = 12
# Forward passes of a layer that batches which are not kept take beside the usual one: up to each of its inputs.
REPEATED = 1.5
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


def estimate(plan: Plan) -> Estimate:
    """Peak memory, disk and time; the time follows from a short measurement of this machine's speed."""
    settings, rows, flat = plan.settings, plan.projections.layers, plan.projections.flat
    tokens = most_tokens(plan)
    fitted = fitted_tokens(plan)
    dtypes = {settings.compute_dtype, torch.float32, torch.float64}
    rates = {dtype: gemm_rate(dtype, settings.device) for dtype in dtypes}
    # Parameters that a token runs through; only some MoE experts are among them.
    active = sum(p.reach * p.numel for p in flat)
    squares = sum(p.reach * n * n for row in rows for p, n in layer_inputs(row))
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
        repeated = 0 if settings.kept_tokens is None else fitted - settings.kept_tokens
        seconds += REPEATED * 2 * 2 * repeated * active / rates[settings.compute_dtype]
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
    needed = sum(upper_numel(n) for row in rows for n in gram_sizes(row)) * 4
    if plan.settings.sensitivity == MEASURED:
        tokens = min(most_tokens(plan), GRADIENT_TOKENS + TOKENS_PER_BATCH)
        hidden = plan.source.config.get_text_config().hidden_size
        needed += sum(upper_numel(p.out_features) + upper_numel(p.in_features) for p in plan.projections.flat) * 4
        needed += tokens * hidden * plan.settings.compute_dtype.itemsize * len(rows)
    # The factors from before distillation, and those from before quantization, are kept.
    stages = (plan.settings.dose is not None) + plan.settings.quantizes
    needed += stages * sum(plan.source.weights.header(f"{p.path}.weight").nbytes for p in plan.projections.flat)
    return needed + plan.source.weights.nbytes


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
