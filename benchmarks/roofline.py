"""Roofline time of a factored layer's two launches on GPUs: computed, not measured.

    python benchmarks/roofline.py [--json FILE]

A launch takes its bytes over the bandwidth that kernels reach, or its FLOPs over the rate that they reach, and a fixed
time for start and drain within a CUDA graph, which is shorter if it overlaps the launch before. The layers are those of
Llama-2-7B in bf16, merged as in vLLM, with ranks that are multiples of 16. The row with a bar is batch 1 on an H100 at
40 %.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_check import LAYERS, REMOVED, rank_for, row
from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
from pgsvd_vllm.kernels.tile_heuristics import default_steps, tiles_for

TOKENS = (1, 8, 32, 128, 512, 2048)
NUMBER = 2  # bytes


@dataclass(frozen=True)
class Gpu:
    """Reached, not nominal: 85 to 90 % of the memory's bandwidth, 80 to 85 % of the tensor cores' rate in bf16."""

    bandwidth: float  # bytes a second
    peak: float  # FLOPs a second
    overlaps: bool


GPUS = {
    "A100": Gpu(1.75e12, 265e12, False),
    "H100": Gpu(3.0e12, 790e12, True),
    "H200": Gpu(4.3e12, 790e12, True),
}
# Of a launch in a CUDA graph that waits for the one before, and of one that overlaps it.
FIXED, OVERLAPPED = 2.0e-6, 0.8e-6
BAR = 1.15


def gemm(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Seconds of one GEMM, without its launch."""
    moved = NUMBER * (rows * columns + tokens * (rows + columns))
    return max(moved / gpu.bandwidth, 2 * tokens * rows * columns / gpu.peak)


def dense(gpu: Gpu, tokens: int, name: str) -> float:
    """Seconds of the dense layer."""
    outs, columns = LAYERS[name]
    return FIXED + gemm(gpu, tokens, sum(outs), columns)


def factored(gpu: Gpu, tokens: int, name: str, removed: float) -> float:
    """Seconds of the factored layer: two launches, or one more per shard with cuBLAS."""
    outs, columns = LAYERS[name]
    ranks = [rank_for(out, columns, removed) for out in outs]
    down = gemm(gpu, tokens, sum(ranks), columns)
    ups = [gemm(gpu, tokens, out, rank) for out, rank in zip(outs, ranks, strict=True)]
    shards = [ShardShape(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    tiles = tiles_for(default_steps(layer_shape_of(shards, columns)), tokens)
    launches = FIXED * (1 + len(ups))
    if tiles:
        launches = FIXED + (OVERLAPPED if gpu.overlaps and tiles[0] else FIXED)
    return down + sum(ups) + launches


def limit(gpu: Gpu, name: str, removed: float) -> float:
    """Seconds that the bytes of the factors alone take."""
    outs, columns = LAYERS[name]
    return sum(NUMBER * rank_for(out, columns, removed) * (out + columns) for out in outs) / gpu.bandwidth


def main() -> int:
    """Print the table; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description="Computed times of a factored Llama-2-7B's layers on GPUs.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print("dense / factored, all four layers together; and in brackets factored / its bytes alone, at 1 token")
    print(
        "| | removed | "
        + " | ".join(f"{n} token{'s'[: n - 1]}" for n in TOKENS)
        + " |\n|---|---|"
        + "---|" * len(TOKENS)
    )
    rows = []
    for name, gpu in GPUS.items():
        for removed in REMOVED:
            cells = []
            for tokens in TOKENS:
                whole = sum(dense(gpu, tokens, layer) for layer in LAYERS)
                gain = whole / sum(factored(gpu, tokens, layer, removed) for layer in LAYERS)
                rows.append(row(f"{name}, {removed:.0%}, {tokens} tokens, dense / factored", gain, None))
                cells.append(f"{gain:.2f}")
            over = sum(factored(gpu, 1, layer, removed) for layer in LAYERS) / sum(
                limit(gpu, layer, removed) for layer in LAYERS
            )
            bar = BAR if (name, removed) == ("H100", 0.4) else None
            rows.append(row(f"{name}, {removed:.0%}, 1 token, factored / its bytes", over, bar))
            cells[0] += f" ({over:.2f})"
            print(f"| {name} | {removed:.0%} | " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
