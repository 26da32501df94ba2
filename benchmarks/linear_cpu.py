"""Time of one factored layer on CPU, as a multiple of the ideal time that its bytes or FLOPs give.

    python benchmarks/linear_cpu.py [--quick] [--json FILE] [--markdown FILE]

The layers are vLLM's own objects in bf16 with random weights, in the shapes of TinyLlama-1.1B and Llama-2-7B; every
shard has the rank that removes a share of its parameters. As in vLLM on CPU, many copies of the layer, 160 MB of
weights, are compiled as one graph; dense and factored graphs run in turn. The value is time / (dense time x share),
with the share of bytes at 1 and 8 tokens and of FLOPs at 512: 1.0 is the full gain of the smaller size. A layer whose
output differs from float64 prints no time and ends the run.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from vllm import config as vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers import linear
from vllm.platforms import current_platform

from benchmarks.random_model import largest_rank
from benchmarks.rows import write_rows
from pgsvd_vllm.format.lowrank import factored_linear, pivot_linear
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.serving.quant_config import PgsvdConfig

# name -> hidden size, heads, key/value heads, feed-forward size.
MODELS = {"TinyLlama-1.1B": (2048, 32, 4, 5632), "Llama-2-7B": (4096, 32, 32, 11008)}
LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
SHARD_IDS: dict[str, str | int] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
FORMS = ("factors", "pivot")
RATIOS = (0.2, 0.4, 0.6)
TOKENS = (1, 8, 64, 512)
# Multiples of the ideal that the median over all shapes may take.
BARS = {1: 1.10, 8: 1.10, 512: 1.15}
# Over all copies of a layer: more than the caches of most machines hold.
COPY_BYTES = 160e6


@contextmanager
def one_rank() -> Iterator[None]:
    """vLLM's state of a single worker."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(vllm_config.set_current_vllm_config(vllm_config.VllmConfig()))
        current_platform.import_kernels()
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/store", backend="gloo"
        )
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.cleanup_dist_env_and_memory()


def rows_of(model: str, leaf: str) -> tuple[dict[str, int], int]:
    """The outputs of every shard of a layer, and its inputs."""
    hidden, heads, kv_heads, wide = MODELS[model]
    key = kv_heads * (hidden // heads)
    rows = {"q_proj": hidden, "k_proj": key, "v_proj": key, "gate_proj": wide, "up_proj": wide}
    return {name: rows.get(name, hidden) for name in LAYERS[leaf]}, wide if leaf == "down_proj" else hidden


class Layer:
    """One vLLM layer with random weights, dense or factored.

    Attributes:
        tensors: of every shard, for the check; empty in all copies but the first.
        size: numbers stored; a token costs two FLOPs for each.
    """

    def __init__(self, model: str, leaf: str, modules: dict[str, FactoredModule], seed: int) -> None:
        hidden, heads, kv_heads, _ = MODELS[model]
        rows, columns = rows_of(model, leaf)
        prefix = f"layers.{seed}.{'-'.join(modules) or 'dense'}"
        config = PgsvdConfig({f"{prefix}.{name}": module for name, module in modules.items()})
        config.packed_modules_mapping = {key: list(value) for key, value in LAYERS.items() if len(value) > 1}
        common: dict[str, Any] = {
            "bias": False,
            "quant_config": config,
            "prefix": f"{prefix}.{leaf}",
            "params_dtype": torch.bfloat16,
        }
        self.layer: nn.Module
        if leaf == "qkv_proj":
            self.layer = linear.QKVParallelLinear(hidden, hidden // heads, heads, kv_heads, **common)
        elif leaf == "gate_up_proj":
            self.layer = linear.MergedColumnParallelLinear(columns, list(rows.values()), **common)
        else:
            self.layer = linear.RowParallelLinear(columns, rows[leaf], **common)
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.size = 0
        for name, count in rows.items():
            module = modules.get(name)
            shapes = {"weight": (count, columns)} if module is None else module.shapes(count, columns)
            tensors = {kind: torch.empty(shape, dtype=torch.bfloat16) for kind, shape in shapes.items()}
            for kind, tensor in tensors.items():
                if kind != "pivots":
                    tensor.uniform_(-(tensor.shape[1] ** -0.5), tensor.shape[1] ** -0.5, generator=generator)
                    self.size += tensor.numel()
            if "pivots" in tensors:
                chosen = torch.randperm(count, generator=generator)[: len(tensors["pivots"])]
                tensors["pivots"] = chosen.sort().values.int()
            for kind, tensor in tensors.items():
                parameter = getattr(self.layer, kind)
                extra = (SHARD_IDS[name],) if len(rows) > 1 else ()
                parameter.weight_loader(parameter, tensor, *extra)
            # Of one copy only: the check needs them, the timing does not.
            self.tensors[name] = tensors if seed == 0 else {}
        self.layer.quant_method.process_weights_after_loading(self.layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        return self.layer.quant_method.apply(self.layer, x)

    def check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Compare an output with float64 on the stored weights; raises RuntimeError."""
        expected = torch.cat([_plain(tensors, x) for tensors in self.tensors.values()], dim=-1)
        error = ((y.double() - expected).norm() / expected.norm()).item()
        # Two roundings to 8 bits lose 0.3 % on average; a row in a wrong place is an error near 1.
        if not error < 0.01:
            raise RuntimeError(f"the layer's output differs from float64 by {error:.1%}")


def _plain(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A shard's output in float64."""
    wide = {kind: tensor.double() for kind, tensor in tensors.items()}
    if "weight" in wide:
        return x.double() @ wide["weight"].T
    if "weight_u" in wide:
        return factored_linear(x.double(), wide["weight_v"], [wide["weight_u"]])
    return pivot_linear(x.double(), wide["weight_p"], wide["weight_c"], tensors["pivots"])


def compiled(layers: list[Layer]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """One graph that calls every layer with the same input, with vLLM's options for CPU."""
    options = vllm_config.get_current_vllm_config().compilation_config.inductor_compile_config
    return torch.compile(lambda x: [layer(x) for layer in layers], options=options)


def in_turn(calls: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times of each call, taken one after the other, again and again, for about `seconds`."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < seconds:
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return times


def peaks() -> dict[str, float]:
    """This machine's peak: GFLOP/s in bf16, and GB/s read and written by a copy."""
    size = 4096
    a = torch.randn(size, size, dtype=torch.bfloat16)
    block = torch.ones(2**28, dtype=torch.uint8)
    other = torch.empty_like(block)
    product, copy = in_turn([lambda: a @ a, lambda: other.copy_(block)], 3)
    return {"GFLOP/s": 2e-9 * size**3 / min(product), "GB/s copied": 2e-9 * block.numel() / min(copy)}


def measure(model: str, leaf: str, ratios: tuple[float, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """One row per form, share and number of tokens."""
    rows, columns = rows_of(model, leaf)
    x = {tokens: torch.randn(tokens, columns).bfloat16() for tokens in TOKENS}
    for tokens in TOKENS[1:]:
        torch._dynamo.mark_dynamic(x[tokens], 0)

    def copies(modules: dict[str, FactoredModule]) -> list[Layer]:
        first = Layer(model, leaf, modules, 0)
        return [first, *(Layer(model, leaf, modules, i + 1) for i in range(int(COPY_BYTES / first.size / 2)))]

    # vLLM's handles of packed weights must not be collected while something is traced: first of all, or at the end.
    torch.compiler.reset()
    gc.collect()
    kept = []
    dense = copies({})
    run_dense = compiled(dense)
    for form in FORMS:
        for ratio in ratios:
            ranks = {name: largest_rank(form, count, columns, 1 - ratio) for name, count in rows.items()}
            factored = copies({name: FactoredModule(rank, form) for name, rank in ranks.items()})
            kept.append(factored)
            run_factored = compiled(factored)
            share = factored[0].size / dense[0].size
            for tokens in TOKENS:
                factored[0].check(x[tokens], run_factored(x[tokens])[0])
                dense[0].check(x[tokens], run_dense(x[tokens])[0])
                times = in_turn([partial(run_dense, x[tokens]), partial(run_factored, x[tokens])], seconds)
                base = statistics.median(times[0]) / len(dense)
                time_taken = statistics.median(times[1]) / len(factored)
                yield {
                    "case": f"{model} {leaf} {form} {ratio:.0%} {tokens} tokens",
                    "form": form,
                    "ratio": ratio,
                    "tokens": tokens,
                    "value": time_taken / (base * share),
                    "dense_us": 1e6 * base,
                    "factored_us": 1e6 * time_taken,
                    "GB/s": 2e-9 * factored[0].size / time_taken,
                    "GFLOP/s": 2e-9 * tokens * factored[0].size / time_taken,
                    "bar": None,
                    "ok": True,
                }


def medians(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each form, share and number of tokens the median over all shapes, with its bar."""
    for form, ratio, tokens in dict.fromkeys((row["form"], row["ratio"], row["tokens"]) for row in rows):
        found = [r["value"] for r in rows if (r["form"], r["ratio"], r["tokens"]) == (form, ratio, tokens)]
        value, bar = statistics.median(found), BARS.get(tokens)
        ok = bar is None or value <= bar
        case = f"median {form} {ratio:.0%} {tokens} tokens"
        yield {"case": case, "value": value, "worst": max(found), "bar": bar, "ok": ok}


def markdown(rows: list[dict[str, Any]], ratios: tuple[float, ...], best: dict[str, float]) -> str:
    """A table of medians, and the times of every shape."""
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        + ", ".join(f"{value:.0f} {unit}" for unit, value in best.items()),
        "",
        "| form, removed | " + " | ".join(f"{tokens} tokens" for tokens in TOKENS) + " |",
        "|---" * (len(TOKENS) + 1) + "|",
    ]
    summary = {row["case"]: row for row in medians(rows)}
    for form in FORMS:
        for ratio in ratios:
            cells = [summary[f"median {form} {ratio:.0%} {tokens} tokens"] for tokens in TOKENS]
            values = " | ".join(f"{cell['value']:.2f} ({cell['worst']:.2f})" for cell in cells)
            lines.append(f"| {form}, {ratio:.0%} | {values} |")
    lines += ["", "| layer | dense us | factored us | GB/s | GFLOP/s | multiple |", "|---" * 6 + "|"]
    lines += [
        f"| {r['case']} | {r['dense_us']:.0f} | {r['factored_us']:.0f} | {r['GB/s']:.0f} | {r['GFLOP/s']:.0f} "
        f"| {r['value']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only 40 %% removed, a third of the repetitions")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    ratios = (0.4,) if arguments.quick else RATIOS
    # Every stack of layers is one more graph of the same function.
    torch._dynamo.config.recompile_limit = 100
    with one_rank(), torch.inference_mode():
        best = peaks()
        rows: list[dict[str, Any]] = []
        for model in arguments.models:
            for leaf in LAYERS:
                for row in measure(model, leaf, ratios, 0.3 if arguments.quick else 1.0):
                    print(f"{row['case']:55} {row['value']:.2f}", file=sys.stderr, flush=True)
                    rows.append(row)
    table = list(medians(rows))
    for row in table:
        print(f"{row['case']:32} {row['value']:.3f}, worst {row['worst']:.3f}", end="")
        print("" if row["bar"] is None else f", bar {row['bar']:.2f} {'ok' if row['ok'] else 'MISSED'}")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, ratios, best), encoding="utf-8")
    write_rows(arguments.json, [*table, *rows])
    return 0 if all(row["ok"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
