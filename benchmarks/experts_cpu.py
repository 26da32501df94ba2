"""Time of factored MoE experts on CPU relative to vLLM's dense experts.

    python benchmarks/experts_cpu.py [--quick] [--json FILE]

The layers are vLLM's own MoE layers in bf16 with random weights, in the shapes of Qwen3-30B-A3B (half of its experts)
and of Mixtral-8x7B (half as wide); every projection has the rank that removes a share of its parameters. Dense and
factored layers run in turn on the same tokens, each of which is routed to random experts. The value is factored time
over dense time; the bar is 1. Dense weights are reconstructed from the factors: different outputs end the run.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from benchmarks.linear_cpu import one_rank
from benchmarks.random_model import largest_rank
from benchmarks.rows import write_rows
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.serving.quant_config import PgsvdConfig

# name -> hidden size, width of an expert, experts, experts a token.
SHAPES = {"Qwen3-30B-A3B": (2048, 768, 64, 8), "Mixtral-8x7B": (4096, 7168, 8, 2)}
RATIOS = (0.2, 0.4)
TOKENS = (1, 8, 64, 512)
# Relative distance of outputs in bf16; another function is 1 off.
GATE = 0.05


def factors(shape: tuple[int, int, int, int], ratio: float) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name of a projection, U [out, r] and V [r, in]."""
    hidden, inner, experts, _ = shape
    generator = torch.Generator().manual_seed(0)
    for number in range(experts):
        for leaf, rows, columns in (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            rank = largest_rank("factors", rows, columns, 1 - ratio)
            u, v = (
                torch.empty(size, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator) * (3 / size[1]) ** 0.5
                for size in ((rows, rank), (rank, columns))
            )
            yield f"{number}.{leaf}", u, v


def moe_layer(shape: tuple[int, int, int, int], ratio: float, factored: bool) -> Any:
    """vLLM's MoE layer, loaded."""
    hidden, inner, experts, chosen = shape
    prefix = f"{'factored' if factored else 'dense'}.{hidden}.{ratio}.mlp.experts"
    table, tensors = {}, []
    for name, u, v in factors(shape, ratio):
        if factored:
            table[f"{prefix}.{name}"] = FactoredModule(u.shape[1], "factors")
            tensors += [(f"{name}.weight_u", u), (f"{name}.weight_v", v)]
        else:
            tensors.append((f"{name}.weight", u @ v))
    runner: Any = FusedMoEFactory(
        num_experts=experts,
        top_k=chosen,
        hidden_size=hidden,
        intermediate_size=inner,
        params_dtype=torch.bfloat16,
        quant_config=PgsvdConfig(table),
        prefix=prefix,
    )
    list(runner.load_weights(tensors))
    layer = runner.routed_experts
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: Any, x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds, and the experts' output."""
    begin = time.perf_counter()
    y = layer.quant_method.apply(layer, x, weights, numbers, None, None)
    return time.perf_counter() - begin, y


def measure(name: str, ratio: float, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per number of tokens; raises RuntimeError if the outputs differ."""
    shape = SHAPES[name]
    hidden, _, experts, chosen = shape
    layers = [moe_layer(shape, ratio, factored) for factored in (False, True)]
    generator = torch.Generator().manual_seed(1)
    for tokens in TOKENS:
        times: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            numbers = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]).int()
            weights = torch.rand(tokens, chosen, generator=generator)
            x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
            results = [run(layer, x, weights, numbers) for layer in layers]
            dense, factored = (y.float() for _, y in results)
            gap = float((factored - dense).norm() / dense.norm())
            if not gap < GATE:
                raise RuntimeError(f"{name}, {tokens} tokens: factored experts differ from the dense ones by {gap:.2f}")
            if turn:  # the first warms up
                for found, (seconds, _) in zip(times, results, strict=True):
                    found.append(seconds)
        dense_ms, factored_ms = (statistics.median(found) * 1e3 for found in times)
        value = factored_ms / dense_ms
        yield {
            "case": f"{name} {ratio:.0%}, {tokens} tokens",
            "value": value,
            "bar": 1.0,
            "ok": value <= 1.0,
            "dense ms": dense_ms,
            "factored ms": factored_ms,
        }


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 25")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with one_rank(), set_forward_context(None, get_current_vllm_config()), torch.inference_mode():
        for name in SHAPES:
            for ratio in RATIOS:
                for row in measure(name, ratio, 5 if arguments.quick else 25):
                    rows.append(row)
                    verdict = "ok" if row["ok"] else "MISSED"
                    times = f"({row['dense ms']:.1f} -> {row['factored ms']:.1f} ms)"
                    print(f"{row['case']:34} {row['value']:.2f} {times}, bar 1.00 {verdict}", flush=True)
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
