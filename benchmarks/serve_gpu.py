"""Latency of dense and factored servers whose batches mix prompts and answers.

    python benchmarks/serve_gpu.py [--quick] [--form FORM] [--ratio R] [--json FILE]

`vllm bench serve` asks two servers, dense and factored, in turn. A step has up to 2048 or 8192 tokens
(--max-num-batched-tokens): chunks of prompts of 1900 tokens beside the answers of other requests. The models have
Llama-2-7B's shape and random weights (random_model.py). A row is the dense over the factored time to the first token
(TTFT) or per output token (TPOT), at the median or the 99th percentile; the bar for medians is 1: never slower than
dense. Both servers share one GPU, which needs 60 GB. --shape tiny shows on any machine that the benchmark runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import random_model
from benchmarks.random_model import LLAMA_2_7B, TINYLLAMA, Shape
from benchmarks.rows import write_rows
from tests.support.reference_model import cache_folder
from tests.support.server import Server, serve

TINY = Shape("tiny", 256, 640, 4, 4, 2)
METRICS = ("ttft", "tpot")
PERCENTILES = (50, 99)


@dataclass(frozen=True)
class Load:
    """The requests of a case, all of them the same.

    Attributes:
        prompt: tokens.
        answer: tokens.
        requests: in total, and `concurrent` of them at a time.
        batched: most tokens of a step.
    """

    prompt: int
    answer: int
    requests: int
    concurrent: int
    batched: int

    @property
    def name(self) -> str:
        """For the row."""
        many = f"{self.concurrent} at a time" if self.concurrent > 1 else "one by one"
        return f"{self.prompt} + {self.answer} tokens, {many}, steps of {self.batched}"


SHAPES = {"llama-2-7b": LLAMA_2_7B, "tinyllama": TINYLLAMA, "tiny": TINY}
LOADS = [Load(1900, 100, 8 * c, c, batched) for batched in (2048, 8192) for c in (1, 16)]
TINY_LOADS = [Load(96, 8, 4, 2, 128)]


def answered(server: Server, load: Load, seed: int, folder: Path) -> dict[str, float]:
    """Milliseconds of every metric and percentile of one run of `vllm bench serve`.

    Raises:
        RuntimeError: a request failed, or the command itself.
    """
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", server.url),
        *("--model", server.model, "--dataset-name", "random", "--seed", str(seed)),
        *("--random-input-len", str(load.prompt), "--random-output-len", str(load.answer), "--ignore-eos"),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrent), "--disable-tqdm"),
        *("--percentile-metrics", ",".join(METRICS), "--metric-percentiles", ",".join(map(str, PERCENTILES))),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["completed"] != load.requests:
        raise RuntimeError(f"{server.model}: {result['completed']} of {load.requests} requests were answered")
    return {f"{metric} p{p}": result[f"p{p}_{metric}_ms"] for metric in METRICS for p in PERCENTILES}


def measure(form: str, ratio: float, shape: Shape, loads: Sequence[Load], rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of every load; servers with another size of steps are started anew."""
    folders = random_model.folder(shape=shape), random_model.folder(form, ratio, shape)
    logs = cache_folder() / "serve-gpu"
    for batched in dict.fromkeys(load.batched for load in loads):
        options = ("--max-num-batched-tokens", str(batched), "--max-model-len", "2048", "--no-enable-prefix-caching")
        options += ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.4")
        with ExitStack() as stack:
            results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers = []
            for folder, loader in zip(folders, ("auto", "pgsvd"), strict=True):
                log = logs.with_name(f"{logs.name}-{folder.name}.log")
                servers.append(stack.enter_context(serve(folder, log, *options, "--load-format", loader)))
            for load in loads:
                if load.batched != batched:
                    continue
                found: list[list[dict[str, float]]] = [[], []]
                for turn in range(rounds + 1):
                    for server, times in zip(servers, found, strict=True):
                        one = answered(server, load, turn, results)
                        if turn:  # the first warms up
                            times.append(one)
                for key in found[0][0]:
                    dense, factored = (statistics.median(one[key] for one in times) for times in found)
                    bar = 1.0 if key.endswith("p50") else None
                    yield {
                        "case": f"{form} {ratio:.0%}, {load.name}, {key}",
                        "value": dense / factored,
                        "bar": bar,
                        "ok": bar is None or dense / factored >= bar,
                        "dense ms": dense,
                        "factored ms": factored,
                    }


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of 3")
    parser.add_argument("--form", choices=["factors", "pivot"], default="factors")
    parser.add_argument("--ratio", type=float, choices=[0.2, 0.4, 0.6], default=0.4)
    parser.add_argument("--shape", choices=SHAPES, default=LLAMA_2_7B.name)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    loads = TINY_LOADS if shape is TINY else LOADS
    rows = []
    for row in measure(arguments.form, arguments.ratio, shape, loads, 1 if arguments.quick else 3):
        rows.append(row)
        bar = "" if row["bar"] is None else f", bar {row['bar']} {'ok' if row['ok'] else 'MISSED'}"
        print(
            f"{row['case']:70} {row['value']:.2f} ({row['dense ms']:.1f} -> {row['factored ms']:.1f} ms){bar}",
            flush=True,
        )
        write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
