"""Roofline time of a factored layer's two launches on GPUs: computed, not measured.

    python benchmarks/roofline.py [--json FILE]

A launch takes its bytes over the bandwidth that kernels reach, or its FLOPs over the rate that they reach, and a fixed
time for start and drain within a CUDA graph, which is shorter if it overlaps the launch before. The layers are those of
Llama-2-7B in bf16, FP8 and INT4, merged as in vLLM, with ranks that are multiples of 16. The row with a bar is batch 1
on an H100 in bf16 at 40 %.

Both models have the same kind of weights. The dense one in FP8 multiplies FP8 inputs, whose quantization is not
counted. The factored one multiplies inputs of 16 bits by FP8 weights where our kernels run; elsewhere each shard's z is
copied and quantized, and the outputs are joined. INT4, in groups of 32, always runs in vLLM's GEMMs of one factor each,
on inputs of 16 bits.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_check import LAYERS, REMOVED, rank_for, row
from benchmarks.rows import write_rows
from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
from pgsvd_vllm.kernels.tile_heuristics import default_steps, tiles_for

TOKENS = (1, 8, 32, 128, 512, 2048)
NUMBER = 2  # bytes of an activation
# Bytes of a weight, with its share of the scales.
WEIGHTS = {"bf16": 2.0, "FP8": 1.0, "INT4": 0.5625}


@dataclass(frozen=True)
class Gpu:
    """Reached, not nominal: 85 to 90 % of the memory's bandwidth, 80 to 85 % of the tensor cores' rate in bf16.

    FP8 has twice that rate.
    """

    bandwidth: float  # bytes a second
    peak: float  # FLOPs a second
    overlaps: bool
    fp8: bool


GPUS = {
    "A100": Gpu(1.75e12, 265e12, False, False),
    "H100": Gpu(3.0e12, 790e12, True, True),
    "H200": Gpu(4.3e12, 790e12, True, True),
}
# Of a launch in a CUDA graph that waits for the one before, and of one that overlaps it.
FIXED, OVERLAPPED = 2.0e-6, 0.8e-6
BAR = 1.15


def gemm(gpu: Gpu, tokens: int, rows: int, columns: int, weight: float, fp8_inputs: bool = False) -> float:
    """Seconds of one GEMM, without its launch; `weight` is the bytes of a weight."""
    moved = weight * rows * columns + NUMBER * tokens * (rows + columns)
    return max(moved / gpu.bandwidth, 2 * tokens * rows * columns / (gpu.peak * (2 if fp8_inputs else 1)))


def dense(gpu: Gpu, tokens: int, name: str, weight: float) -> float:
    """Seconds of the dense layer; `weight` is the bytes of a weight."""
    outs, columns = LAYERS[name]
    return FIXED + gemm(gpu, tokens, sum(outs), columns, weight, weight == 1)


def factored(gpu: Gpu, tokens: int, name: str, removed: float, weight: float) -> float:
    """Seconds of the factored layer: two launches, or with library GEMMs one more per shard."""
    outs, columns = LAYERS[name]
    ranks = [rank_for(out, columns, removed) for out in outs]
    shards = [ShardShape(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    steps = default_steps(layer_shape_of(shards, columns, round(8 * weight)))
    tiles = tiles_for(steps, tokens) if weight >= 1 else None
    fp8_inputs = weight == 1 and tiles is None
    down = gemm(gpu, tokens, sum(ranks), columns, weight, fp8_inputs)
    ups = [gemm(gpu, tokens, out, rank, weight, fp8_inputs) for out, rank in zip(outs, ranks, strict=True)]
    launches = FIXED * (1 + len(ups) * (2 if fp8_inputs else 1))
    if weight < 2 and len(ups) > 1:
        # vLLM's quantized GEMMs take contiguous inputs and allocate their outputs, which are joined.
        launches += FIXED * (len(ups) + 1)
    if tiles:
        launches = FIXED + (OVERLAPPED if gpu.overlaps and tiles[0] else FIXED)
    return down + sum(ups) + launches


def limit(gpu: Gpu, name: str, removed: float, weight: float) -> float:
    """Seconds that the bytes of the factors alone take."""
    outs, columns = LAYERS[name]
    return sum(weight * rank_for(out, columns, removed) * (out + columns) for out in outs) / gpu.bandwidth


def main() -> int:
    """Print the table; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description="Computed times of a factored Llama-2-7B's layers on GPUs.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print("dense / factored, all four layers together; and in brackets factored / its bytes alone, at 1 token")
    print(
        "| | weights | removed | "
        + " | ".join(f"{n} token{'s'[: n - 1]}" for n in TOKENS)
        + " |\n|---|---|---|"
        + "---|" * len(TOKENS)
    )
    rows = []
    cases = [
        (name, gpu, kind, weight)
        for kind, weight in WEIGHTS.items()
        for name, gpu in GPUS.items()
        if kind != "FP8" or gpu.fp8
    ]
    for (name, gpu, kind, weight), removed in itertools.product(cases, REMOVED):
        cells = []
        at = f"{name}, {kind}, {removed:.0%}"
        for tokens in TOKENS:
            whole = sum(dense(gpu, tokens, layer, weight) for layer in LAYERS)
            gain = whole / sum(factored(gpu, tokens, layer, removed, weight) for layer in LAYERS)
            rows.append(row(f"{at}, {tokens} tokens, dense / factored", gain, None))
            cells.append(f"{gain:.2f}")
        over = sum(factored(gpu, 1, layer, removed, weight) for layer in LAYERS) / sum(
            limit(gpu, layer, removed, weight) for layer in LAYERS
        )
        bar = BAR if (name, kind, removed) == ("H100", "bf16", 0.4) else None
        rows.append(row(f"{at}, 1 token, factored / its bytes", over, bar))
        cells[0] += f" ({over:.2f})"
        print(f"| {name} | {kind} | {removed:.0%} | " + " | ".join(cells) + " |")
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
