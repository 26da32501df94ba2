"""Time that the CPU takes to launch a layer's GEMMs for many tokens, and the calls to torch that it makes.

    python benchmarks/launch_table.py [--host] [--quick] [--json FILE]

Outside of CUDA graphs a step takes at least the sum of these times. The layers are those of Llama-2-7B at 40 % removed
with 512 tokens on a GPU; with `--host`, or without a GPU, they have its structure and tiny sizes, so that the products
hardly count. Rows of calls have bars: a decoder layer's fewest.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_check import LAYERS, Row, row, shards_of
from benchmarks.rows import write_rows
from pgsvd_vllm.kernels.autotune import RandomLayer
from pgsvd_vllm.kernels.cublas import run_library
from pgsvd_vllm.kernels.layer_shape import ShardShape

TOKENS, REMOVED = 512, 0.4
# Calls to torch of each layer; a pivot form's outputs are put in order by one Triton launch on GPUs, by a call here.
CALLS = {
    "factors": {"qkv": 7, "o": 2, "gate_up": 6, "down": 2},
    "pivots": {"qkv": 8, "o": 6, "gate_up": 7, "down": 6},
}
# A GPU's queue holds about a thousand launches; more would wait for the GPU.
BATCH = 50


class Calls(TorchDispatchMode):
    """Counts the calls to torch's operators, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator."""
        self.count += 1
        return function(*args, **(kwargs or {}))


def microseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The least mean time of some calls until they are launched, over several rounds."""
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / BATCH


def layer_rows(device: torch.device, rounds: int) -> Iterator[Row]:
    """Every layer, as plain factors and in the pivot form."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for form, calls in CALLS.items():
        whole = 0.0
        for name, (outs, columns) in LAYERS.items():
            shards = shards_of(name, REMOVED, form == "pivots")
            if not on_gpu:
                columns, shards = 32, [ShardShape(48, 16, 16 if form == "pivots" else None) for _ in outs]
            layer = RandomLayer(shards, columns, dtype, device).pack()
            x = torch.randn(TOKENS if on_gpu else 2, columns, device=device).to(dtype)
            with Calls() as counted:
                run_library(x, layer)
            yield row(f"{name}, {form}, calls", counted.count, calls[name])
            taken = microseconds(lambda x=x, layer=layer: run_library(x, layer, kernels=on_gpu), device, rounds)  # type: ignore[misc]
            whole += taken
            yield row(f"{name}, {form}, us", taken, None)
        yield row(f"decoder layer, {form}, us", whole, None)


def torch_rows(device: torch.device, rounds: int) -> Iterator[Row]:
    """Single calls to torch."""
    on_gpu = device.type == "cuda"
    tokens, width = (TOKENS, 4096) if on_gpu else (2, 32)
    x, weight, both = (torch.randn(n, width, device=device) for n in (tokens, width, tokens))
    both = torch.cat([both, both], 1)
    columns, part = weight.T, both[:, :width]
    yield row("mm, us", microseconds(lambda: torch.mm(x, columns), device, rounds), None)
    yield row("mm into a slice, us", microseconds(lambda: torch.mm(x, columns, out=part), device, rounds), None)
    yield row("F.linear, us", microseconds(lambda: F.linear(x, weight), device, rounds), None)


def main() -> int:
    """Print the table; 1 if a layer makes more calls than its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="store_true", help="on the CPU with tiny sizes, also where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.host or not torch.cuda.is_available() else "cuda")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    for part in (torch_rows, layer_rows):
        for found in part(device, 5 if arguments.quick else 50):
            rows.append(found)
            bar = "" if found["bar"] is None else f"  bar {found['bar']} {'ok' if found['ok'] else 'MISSED'}"
            print(f"{found['case']:36} {found['value']:8.1f}{bar}", flush=True)
    write_rows(arguments.json, rows)
    return 0 if all(found["ok"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
