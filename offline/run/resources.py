"""What a compression will cost, and what to do where that is too much."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.calibration.lm_head import HEAD_ROWS
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.run.plan import Plan

# ALS sweeps a projection takes at the default tolerance, for the time estimate.
TYPICAL_SWEEPS = 12


@dataclass(frozen=True)
class Estimate:
    """Resources a plan needs; bytes and seconds."""

    memory: int
    disk: int
    seconds: float


def memory_bytes(plan: Plan) -> int:
    """Peak memory, from the shapes."""
    tokens, hidden = plan.most_tokens, plan.source.config.get_text_config().hidden_size
    width = plan.compute_dtype.itemsize
    grams = [_gram_sizes(row) for row in plan.projections]
    layer = max(sum(p.numel for p in row) for row in plan.projections) * width
    embeddings = plan.source.vocabulary * hidden * width
    widest = max(max(p.in_features, p.out_features) for p in plan.flat)
    # In float64, of the layer-by-layer fit of a projection with many inputs.
    square = max((p.in_features**2 for p in plan.flat if p.reach == 1), default=0)
    # What a tower hands on stays until the model has run, and of the factored model as well.
    kept = sum(plan.tokens_of(tower.name) for tower in plan.source.towers[:-1]) * (2 if plan.sequential else 1)
    memory = (
        layer + embeddings + tokens * hidden * width
        + max(sum(n * n for n in sizes) for sizes in grams) * 8
        + min(TOKENS_PER_BATCH, tokens) * widest * 8
        + max(4 * widest * min(widest, 4096), (7 if plan.sequential else 0) * square) * 8
        + kept * hidden * width
        + 400 * 1024**2  # torch and transformers themselves
    )  # fmt: skip
    if plan.sensitivity == "measured":
        memory += max(sum(p.out_features**2 + p.in_features**2 for p in row) for row in plan.projections) * 8
        memory += 3 * _activation_bytes(plan, width)
    walked = min(tokens, SEQUENTIAL_TOKENS) if plan.sequential else 0
    # The factored hidden states, the dense layer's inputs of its projections, and what the paused runs hold: as much.
    # Nothing of experts is kept.
    paused = max(sum(_gram_sizes([p for p in row if p.reach == 1])) for row in plan.projections)
    memory += walked * (hidden + 2 * paused) * width
    if plan.head is not None:
        # The matrix and its float32 logits, and blocks and square matrices in float64.
        memory += plan.head.numel * width + 6 * plan.head.in_features**2 * 8 + HEAD_ROWS * plan.head.in_features * 8 * 4
    if plan.options.refine is not None:
        # Dense model, student, and float32 numbers with gradients and Adam's two moments.
        memory += 2 * plan.total_parameters * width + 16 * sum(p.numel for p in plan.flat)
        length = plan.length
        memory += 2 * len(plan.projections) * length * _features(plan) * width + 4 * length * plan.source.vocabulary * 4
    return memory


def estimate(plan: Plan) -> Estimate:
    """Peak memory, disk and time; the time from a short measurement of this machine's speed."""
    tokens = plan.most_tokens
    walked = min(tokens, SEQUENTIAL_TOKENS) if plan.sequential else 0
    rates = {d: _flops_per_second(d, plan.device) for d in {plan.compute_dtype, torch.float32, torch.float64}}
    # A token meets some of the experts.
    met = sum(p.reach * p.numel for p in plan.flat)
    squares = sum(p.reach * n * n for row in plan.projections for p, n in _inputs(row))
    seconds = 2 * tokens * met / rates[plan.compute_dtype] + 2 * tokens * squares / rates[torch.float32]
    if plan.sensitivity == "measured":
        backward = min(tokens, GRADIENT_TOKENS)
        seconds += 4 * backward * met / rates[plan.compute_dtype]
        both = sum(p.reach * (p.out_features**2 + p.in_features**2) for p in plan.flat)
        seconds += 2 * backward * both / rates[torch.float32]
    if plan.sequential:
        # Every layer dense and factored; of every input C', D and, unless all tokens take part, C, all but D by half.
        seconds += 2 * 2 * walked * met / rates[plan.compute_dtype]
        seconds += (3 if walked == tokens else 4) * walked * squares / rates[torch.float32]
    seconds += 60 * (plan.options.refine or 0)
    eigen = _eigenvector_rate(plan.device)
    for p in plan.flat:
        small = min(p.out_features, p.in_features)
        seconds += (2 * p.in_features * p.numel + TYPICAL_SWEEPS * 4 * small**3) / rates[torch.float64]
        seconds += small**3 / eigen
    return Estimate(memory_bytes(plan), disk_bytes(plan), seconds)


def disk_bytes(plan: Plan) -> int:
    """Peak disk: the finished layers, their inputs while gradients are measured, and the result."""
    needed = sum(n * n for row in plan.projections for n in _gram_sizes(row)) * 4
    if plan.sensitivity == "measured":
        tokens = min(plan.most_tokens, GRADIENT_TOKENS + TOKENS_PER_BATCH)
        hidden = plan.source.config.get_text_config().hidden_size
        needed += sum(p.out_features**2 + p.in_features**2 for p in plan.flat) * 4
        needed += tokens * hidden * plan.compute_dtype.itemsize * len(plan.projections)
    return needed + sum(info.nbytes for info in plan.source.tensors.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on a device now; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def fit_into_memory(plan: Plan, say: Callable[[str], None]) -> Plan:
    """The plan, or one whose sensitivities come from forward passes alone where gradients do not fit.

    Only the default gives way: what was asked for is tried.

    Args:
        plan: the request.
        say: called with one line where it gives way.
    """
    free = free_memory(plan.device)
    if free is None or plan.options.sensitivity is not None or plan.sensitivity != "measured":
        return plan
    needed = memory_bytes(plan)
    if needed <= free:
        return plan
    say(
        f"measuring loss gradients needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
        "sensitivities come from forward passes alone, which is cruder (--sensitivity measured tries all the same)"
    )
    return replace(plan, options=replace(plan.options, sensitivity="forward"))


def _activation_bytes(plan: Plan, width: int) -> int:
    """The widest activations of one batch: logits of a window, or a layer's intermediate values."""
    batch = min(TOKENS_PER_BATCH, plan.most_tokens)
    return max(plan.length * plan.source.vocabulary * 4, batch * _features(plan) * width)


def _features(plan: Plan) -> int:
    """Inputs and outputs of the widest layer's projections, numbers a token, which meets some of the experts."""
    return max(round(sum(p.reach * (p.out_features + p.in_features) for p in row)) for row in plan.projections)


def _inputs(row: list[Projection]) -> list[tuple[Projection, int]]:
    """The distinct inputs of a layer, with their sizes, taking neighbours of equal width to share one."""
    found: list[tuple[Projection, int]] = []
    for p in row:
        if not found or found[-1][1] != p.in_features:
            found.append((p, p.in_features))
    return found


def _gram_sizes(row: list[Projection]) -> list[int]:
    return [size for _, size in _inputs(row)]


def _flops_per_second(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        product = a @ a
    product.sum().item()
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def _eigenvector_rate(device: torch.device, size: int = 512) -> float:
    """Cubes of a matrix's size a second: on GPUs eigenvectors take a hundred times what their operations would."""
    a = torch.randn(size, size, dtype=torch.float64, device=device)
    a = a + a.T
    torch.linalg.eigh(a)
    start = time.perf_counter()
    torch.linalg.eigh(a).eigenvalues.sum().item()
    return size**3 / (time.perf_counter() - start)


def check_disk(plan: Plan, needed: int, folder: Path) -> None:
    """Refuse to start where the disk cannot hold the result; raises InputError."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"--output-dir {plan.options.output}: needs about {needed / 1e9:.1f} GB of disk while it works, "
            f"{free / 1e9:.1f} GB are free"
        )
