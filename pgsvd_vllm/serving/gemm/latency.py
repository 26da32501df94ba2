"""Measures the latency of dense and low-rank GEMMs of given shapes, by the code that serves them, on this CPU.

Each measurement runs over many copies of the weights, more bytes than most caches hold, as a decode step does, which
reads each weight once. Dense GEMMs and those of every rank alternate. Each projection is timed on its own: vLLM
merges some of them into one GEMM, which saves a few microseconds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from pgsvd_vllm.format.latency_table import LatencyTable, ShapeLatencies, ranks_of_table
from pgsvd_vllm.format.schema import FORMS, stored_size
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms
from pgsvd_vllm.serving.vllm_compat.cpu_gemm import vllm_gemm

COPY_BYTES = 96e6
# Copies of small matrices may fit into caches, so that they are timed as faster than they are.
MOST_COPIES = 256
SECONDS_A_SHAPE = 4.0
Layer = Callable[[torch.Tensor], torch.Tensor]


def measure(
    shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, say: Callable[[str], None]
) -> LatencyTable:
    """Time all shapes.

    Args:
        shapes: (out, in) of the weights.
        tokens: of each GEMM; 1 is the decode of one request.
        dtype: of weights and inputs.
        say: called with one line a shape.
    """
    found = {}
    for out, width in shapes:
        ranks = {form: ranks_of_table(form, out, width) for form in FORMS}
        variants: list[tuple[str, int]] = [("dense", 0), *((form, r) for form, many in ranks.items() for r in many)]
        stacks = [list(_copies(kind, out, width, rank, dtype)) for kind, rank in variants]
        times = dict(zip(variants, in_turn(stacks, torch.randn(tokens, width, dtype=dtype)), strict=True))
        del stacks
        forms = {form: [(r, round(times[form, r], 2)) for r in many] for form, many in ranks.items()}
        found[out, width] = ShapeLatencies(round(times["dense", 0], 2), forms)
        middle = {form: points[len(points) // 2] for form, points in forms.items() if points}
        say(
            f"{out} x {width}: dense {times['dense', 0]:.1f} us"
            + "".join(f", {form} of rank {rank} {time_taken:.1f} us" for form, (rank, time_taken) in middle.items())
        )
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    return LatencyTable(found, tokens, str(dtype).removeprefix("torch."), machine)


def in_turn(stacks: Sequence[Sequence[Layer]], x: torch.Tensor) -> list[float]:
    """Median microseconds of one layer of each stack."""
    times: list[list[float]] = [[] for _ in stacks]
    begin = time.perf_counter()
    # The first round warms up.
    while len(times[0]) < 4 or time.perf_counter() - begin < SECONDS_A_SHAPE:
        for stack, found in zip(stacks, times, strict=True):
            start = time.perf_counter()
            for layer in stack:
                layer(x)
            found.append(1e6 * (time.perf_counter() - start) / len(stack))
    return [statistics.median(found[1:]) for found in times]


def _copies(kind: str, out: int, width: int, rank: int, dtype: torch.dtype) -> Iterator[Layer]:
    """Layers of one kind, each with weights of its own."""

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype).uniform_(-1, 1)

    numbers = out * width if kind == "dense" else stored_size(kind, out, width, rank)
    for _ in range(min(MOST_COPIES, 2 + int(COPY_BYTES / dtype.itemsize / numbers))):
        if kind == "dense":
            yield _dense(weight(out, width))
        elif kind == "factors":
            yield FactoredGemms([Shard(weight(rank, width), weight(out, rank))])
        else:
            places = torch.cat([torch.arange(out - rank), -1 - torch.arange(rank)])[torch.randperm(out)]
            yield FactoredGemms([Shard(weight(rank, width), weight(out - rank, rank), places)])


def _dense(weight: torch.Tensor) -> Layer:
    run = vllm_gemm(weight)
    return lambda x: run(x, None)
