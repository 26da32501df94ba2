"""Correctness and speed of the Triton kernels on this GPU.

    python benchmarks/gpu_check.py [--dry-run] [--quick] [--json FILE]

It needs torch and triton alone, no network, and about five minutes of an H100. It compares random layers and those of
Llama-2-7B with float64, repeatedly. Then it times the latter with 20, 40 and 60 % removed beside the dense ones, in
CUDA graphs over more copies than the cache holds; tunes two; and runs a whole model if vLLM is installed. The exit
status is 1 if a result is wrong; speeds have bars but do not fail.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import write_rows
from pgsvd_vllm.kernels.autotune import LayerTuner, RandomLayer, rounded
from pgsvd_vllm.kernels.cublas import run_library, run_library_gated
from pgsvd_vllm.kernels.cuda_timer import COPY_BYTES, seconds
from pgsvd_vllm.kernels.launch import SplitKScratch, can_overlap, room, run, run_gated
from pgsvd_vllm.kernels.layer_shape import ALIGNMENT, ShardShape
from pgsvd_vllm.kernels.numerics import gated_difference, layer_difference
from pgsvd_vllm.kernels.packed_weights import Gate, PackedLayer
from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix
from pgsvd_vllm.kernels.tile_heuristics import (
    FEW_TOKENS,
    FEW_TOKENS_OF_MANY,
    MOST_BLOCK_M,
    MOST_TOKENS,
    Step,
    default_steps,
    own_tiles,
    tiles_for,
)
from tests.kernels.interpreted import Layer, gated_layer, scaled_gemms

Row = dict[str, Any]

# Outputs of each shard, and inputs.
LAYERS = {
    "qkv": ((4096, 4096, 4096), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((11008, 11008), 4096),
    "down": ((4096,), 11008),
}
REMOVED = (0.2, 0.4, 0.6)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048)
RANDOM_LAYERS = 300
REPEATS = 200
# The bar: a multiple of the dense layer's time times the share of its bytes, for few tokens.
MOST_OF_IDEAL = 1.15


def rank_for(out: int, columns: int, removed: float, pivots: bool = False) -> int:
    """The largest rank that removes a share of a shard's numbers."""
    both, kept = out + columns, (1 - removed) * out * columns
    rank = (both - (both**2 - 4 * kept) ** 0.5) / 2 if pivots else kept / both
    return int(rank) // ALIGNMENT * ALIGNMENT


def most_room(space: SplitKScratch, packed: PackedLayer) -> None:
    """Allocate scratch memory for our kernels at any number of tokens."""
    steps = [Step(most, own_tiles(most, packed.sizes)) for most in (16, FEW_TOKENS, FEW_TOKENS_OF_MANY, MOST_TOKENS)]
    space.grow(*room(len(packed.v), tuple(steps)))


def shards_of(name: str, removed: float, pivots: bool = False) -> list[ShardShape]:
    """A layer's shards, as plain factors or with all pivot rows."""
    outs, columns = LAYERS[name]
    ranks = [rank_for(out, columns, removed, pivots) for out in outs]
    return [ShardShape(out, rank, rank if pivots else None) for out, rank in zip(outs, ranks, strict=True)]


def correctness(device: torch.device, overlap: bool, count: int) -> Iterator[Row]:
    """Random layers against float64, by our kernels with their own tiles, and by cuBLAS.

    With weights of 8 bits float64 GEMMs take the place of vLLM's.
    """
    rng = random.Random(0)
    torch.manual_seed(0)
    space = SplitKScratch(device)
    kinds: list[tuple[torch.dtype, torch.dtype | None]] = [
        (dtype, None) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    kinds += [(torch.bfloat16, weights) for weights in eight_bits(device)]
    for dtype, weights in kinds:
        wrong = []
        for number in range(count):
            columns = rng.choice([16, 100, 576, 2048, 4100])
            gated = number % 3 == 0
            layer = (gated_layer if gated else Layer)(rng, dtype, columns, weights)
            shards = [shard.to(device) for shard in layer.shards]
            packed = PackedLayer(shards, dtype=dtype)
            gemms = scaled_gemms(packed)
            most_room(space, packed)
            tokens = rng.choice([0, 1, 2, 7, 16, 17, 40, 64, 65, 200, MOST_TOKENS])
            x = torch.randn(tokens, packed.columns, device=device).to(dtype)
            bias = torch.randn(packed.out, device=device).to(dtype) if rng.random() < 0.5 else None
            wrong.append(layer_difference(x, shards, bias, run_library(x, packed, bias, kernels=True, gemms=gemms)))
            # float32 is never served by the kernels, since it spills registers, nor are many tokens with 8 bits.
            if dtype == torch.float32 or (weights is not None and tokens > MOST_BLOCK_M):
                continue
            wrong.append(layer_difference(x, shards, bias, run(x, packed, space, bias, overlap=overlap)))
            if gated:
                gate = Gate(packed, shards)
                wrong.append(
                    gated_difference(x, shards, bias, run_gated(x, packed, gate, space, bias, overlap=overlap))
                )
                if packed.sources is not None:
                    ordered = run_library_gated(x, packed, gate, bias, gemms)
                    wrong.append(gated_difference(x, shards, bias, ordered))
        yield verdict(f"random layers, {dtype}" + ("" if weights is None else f", weights {weights}"), wrong)


def eight_bits(device: torch.device) -> list[torch.dtype]:
    """The dtypes of 8-bit weights that the kernels read on this GPU."""
    has_fp8 = not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
    return [torch.int8, torch.float8_e4m3fn] if has_fp8 else [torch.int8]


def row(case: str, value: float, bar: float | None) -> Row:
    """A finished measurement; its value may not exceed the bar."""
    return {"case": case, "value": value, "bar": bar, "ok": bar is None or value <= bar}


def verdict(case: str, wrong: Sequence[str]) -> Row:
    """The number of comparisons that found a wrong result, and the first of their messages."""
    found = [text for text in wrong if text]
    return row(f"{case}, wrong" + (f" ({found[0]})" if found else ""), len(found), 0)


class Stack:
    """Copies of one layer of random numbers, dense or factored."""

    def __init__(
        self, name: str, removed: float, device: torch.device, space: SplitKScratch, pivots: bool = False
    ) -> None:
        outs, columns = LAYERS[name]
        dense = sum(outs) * columns
        shards = shards_of(name, removed, pivots)
        kept = sum((shard.rank or 0) * (shard.out - (shard.pivots or 0) + columns) for shard in shards)
        kept = kept if removed else dense
        self.share = kept / dense
        self.columns = columns
        self.dense: list[torch.Tensor] = []
        self.packed: list[PackedLayer] = []
        self.gates: list[Gate] = []
        copies = 1 + int(COPY_BYTES / 2 / kept)
        if not removed:
            self.dense = [
                torch.randn(sum(outs), columns, device=device, dtype=torch.bfloat16) / columns**0.5
                for _ in range(copies)
            ]
            return
        for _ in range(copies):
            layer = RandomLayer(shards, columns, torch.bfloat16, device)
            self.packed.append(layer.pack())
            if name == "gate_up":
                self.gates.append(Gate(self.packed[-1], layer.shards))
        most_room(space, self.packed[0])


def real_layers(device: torch.device, overlap: bool) -> Iterator[Row]:
    """Layers of Llama-2-7B at 40 %, against float64, and repeated: bit-identical in any order of programs."""
    space = SplitKScratch(device)
    for name, pivots in itertools.product(LAYERS, (False, True)):
        columns = LAYERS[name][1]
        layer = RandomLayer(shards_of(name, 0.4, pivots), columns, torch.bfloat16, device)
        packed = layer.pack()
        most_room(space, packed)
        gate = Gate(packed, layer.shards) if name == "gate_up" else None
        wrong: list[str] = []
        differing = 0
        for tokens in (1, 16, 64, MOST_TOKENS):
            x = torch.randn(tokens, columns, device=device).bfloat16()
            runs = [(layer_difference, partial(run, x, packed, space, overlap=overlap))]
            if gate:
                runs.append((gated_difference, partial(run_gated, x, packed, gate, space, overlap=overlap)))
            for compare, compute in runs:
                first = compute()
                wrong.append(compare(x, layer.shards, None, first))
                differing += sum(not torch.equal(first, compute()) for _ in range(REPEATS // 4))
        at = f"{name}, {'pivots' if pivots else 'factors'}"
        yield verdict(at, wrong)
        yield row(f"{at}, runs that differ from the first", differing, 0)
        yield row(f"{at}, counters left", int(space.counters.count_nonzero()), 0)


def in_graphs(device: torch.device, overlap: bool) -> Iterator[Row]:
    """Chains of layers in CUDA graphs, whose launches follow each other at once, for one input after the other."""
    space = SplitKScratch(device)
    kinds = {
        "factors": [ShardShape(4096, 1232), ShardShape(1024, 400), ShardShape(1024, 512)],
        "factors and a dense shard": [ShardShape(4096, 1232), ShardShape(1024, 400), ShardShape(1024)],
        "pivots": [ShardShape(4096, 1504, 1504), ShardShape(1024, 512, 512)],
        "pivots, factors and a dense shard": [ShardShape(4096, 1504, 1504), ShardShape(1024, 400), ShardShape(1024)],
        "gate": [ShardShape(11008, 2048, 2048), ShardShape(11008, 1776)],
    }
    for (name, shards), tokens in itertools.product(kinds.items(), (1, 16, 32, 64)):
        layers = [RandomLayer(shards, 4096, torch.bfloat16, device) for _ in range(4)]
        packed = [layer.pack() for layer in layers]
        most_room(space, packed[0])
        compare, calls = layer_difference, [partial(run, layer=p, scratch=space, overlap=overlap) for p in packed]
        if name == "gate":
            gates = [Gate(p, layer.shards) for p, layer in zip(packed, layers, strict=True)]
            compare = gated_difference
            calls = [
                partial(run_gated, layer=p, gate=gate, scratch=space, overlap=overlap)
                for p, gate in zip(packed, gates, strict=True)
            ]
        x = torch.randn(tokens, 4096, device=device).bfloat16()
        for call in calls:
            call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call(x) for call in calls]
        wrong = []
        for _ in range(5):
            x.copy_(torch.randn(tokens, 4096, device=device))
            graph.replay()
            wrong += [compare(x, layer.shards, None, y) for layer, y in zip(layers, outputs, strict=True)]
        yield verdict(f"in a graph, {name}, {tokens} tokens", wrong)


def speed(device: torch.device, overlap: bool, tokens_of: tuple[int, ...]) -> Iterator[Row]:
    """Factored layers as served without the activation, in turn with dense; last, a decoder layer's four together."""
    space = SplitKScratch(device)
    totals: dict[tuple[str, float, int], list[float]] = {}

    def timed(layer: Callable[[Any], object], weights: Sequence[Any]) -> float:
        return seconds([partial(layer, one) for one in weights], device)

    for name in LAYERS:
        dense = Stack(name, 0.0, device, space)
        inputs = {tokens: torch.randn(tokens, dense.columns, device=device).bfloat16() for tokens in tokens_of}
        times = {tokens: timed(lambda w, x=x: F.linear(x, w), dense.dense) for tokens, x in inputs.items()}
        for form, removed in itertools.product(("factors", "pivots"), REMOVED):
            stack = Stack(name, removed, device, space, form == "pivots")
            amd = bool(torch.version.hip)
            steps = default_steps(stack.packed[0].sizes, amd=amd)
            for tokens, x in inputs.items():
                at = f"{name}, {form}, {removed:.0%} removed, {tokens} tokens"
                library = timed(lambda p, x=x: run_library(x, p, kernels=True), stack.packed)
                taken, tiles = library, tiles_for(steps, tokens)
                if tiles:
                    taken = timed(lambda p, x=x, t=tiles: run(x, p, space, tiles=t, overlap=overlap), stack.packed)
                    yield row(f"{at}, cuBLAS / ours", library / taken, None)
                bar = MOST_OF_IDEAL if tokens <= FEW_TOKENS else None
                yield row(f"{at}, time / (dense x share)", taken / times[tokens] / stack.share, bar)
                yield row(f"{at}, dense / time", times[tokens] / taken, None)
                whole = totals.setdefault((form, removed, tokens), [0.0, 0.0])
                whole[0] += times[tokens]
                whole[1] += taken
                if tiles and stack.gates:
                    # Without vLLM's kernel, one that reads and writes as many bytes takes its place.
                    half = x.new_empty(tokens, stack.gates[0].half)
                    own = own_tiles(tokens, stack.packed[0].sizes, gated=True, amd=amd)

                    def apart(p: PackedLayer, x: torch.Tensor = x, half: torch.Tensor = half, t: Any = tiles) -> None:
                        torch.mul(*run(x, p, space, tiles=t, overlap=overlap).chunk(2, 1), out=half)

                    def within(p: tuple[PackedLayer, Gate], x: torch.Tensor = x, t: Any = own) -> None:
                        run_gated(x, *p, space, tiles=t, overlap=overlap)

                    gain = timed(apart, stack.packed) / timed(within, list(zip(stack.packed, stack.gates, strict=True)))
                    yield row(f"{at}, with SiLU, apart / in one", gain, None)
    for (form, removed, tokens), (plain, taken) in totals.items():
        yield row(f"all four, {form}, {removed:.0%} removed, {tokens} tokens, dense / time", plain / taken, None)


def fp8_speed(device: torch.device, overlap: bool) -> Iterator[Row]:
    """FP8 factors for few tokens in turn with torch's dense FP8 GEMM, whose inputs have been quantized before."""
    if torch.float8_e4m3fn not in eight_bits(device):
        return
    space = SplitKScratch(device)
    fp8 = torch.float8_e4m3fn
    for removed, tokens in itertools.product(REMOVED, (1, 8, 32)):
        plain = taken = 0.0
        for name, (outs, columns) in LAYERS.items():
            copies = 1 + int(COPY_BYTES / (sum(outs) * columns))
            dense = [rounded(torch.randn(sum(outs), columns, device=device), fp8) for _ in range(copies)]
            x = torch.randn(tokens, columns, device=device).bfloat16()
            inputs = rounded(x, fp8)

            def scaled(weight: QuantizedMatrix, inputs: QuantizedMatrix = inputs) -> None:
                torch._scaled_mm(
                    inputs.values,
                    weight.values.T,
                    inputs.scale,
                    weight.scale.T,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )

            plain += seconds([partial(scaled, one) for one in dense], device)
            layers = [
                RandomLayer(shards_of(name, removed), columns, torch.bfloat16, device, fp8) for _ in range(copies)
            ]
            packed = [layer.pack() for layer in layers]
            most_room(space, packed[0])
            taken += seconds([partial(run, x, one, space, overlap=overlap) for one in packed], device)
        yield row(f"all four, FP8 factors, {removed:.0%} removed, {tokens} tokens, dense / time", plain / taken, None)


def tuned(device: torch.device, overlap: bool) -> Iterator[Row]:
    """The tiles that `pgsvd-vllm tune` would find for two layers."""
    for name in ("qkv", "down"):
        tuner = LayerTuner(shards_of(name, 0.4), LAYERS[name][1], torch.bfloat16, device, overlap)
        for tokens in (1, 64):
            try:
                found = tuner.step(tokens)
            except ValueError as error:
                yield row(f"{name}, tuning: {error}", 1, 0)
                continue
            at = f"{name}, 40% removed, {tokens} tokens, tuned"
            yield row(f"{at}, wrong tiles" + "".join(f" ({text})" for text in found.wrong[:1]), len(found.wrong), 0)
            yield row(f"{at}, tiles that do not fit", found.refused, None)
            yield row(f"{at}, default / best", found.default / found.best, None)


def can_serve() -> bool:
    """Whether vLLM and pgsvd-vllm are installed; says so if they are not both."""
    plugins = entry_points(group="vllm.general_plugins")
    found = find_spec("vllm") is not None and any(plugin.name == "pgsvd" for plugin in plugins)
    if not found:
        print("whole models: skipped, vLLM and pgsvd-vllm are not both installed")
    return found


def servers() -> Iterator[Row]:
    """Dense and factored servers of Llama-2-7B's shape under requests, in turn."""
    from benchmarks.random_model import LLAMA_2_7B
    from benchmarks.serve_gpu import LOADS, measure

    for found in measure("factors", 0.4, LLAMA_2_7B, LOADS, 1):
        yield row(f"servers, {found['case']}", found["value"], None)


def whole_model() -> Iterator[Row]:
    """Random models of Llama-2-7B's shape in vLLM, dense and factored in turn."""
    from benchmarks.random_model import LLAMA_2_7B
    from benchmarks.serve_cpu import FORMS, measure
    from tests.support.reference_model import cache_folder

    cache_folder().mkdir(parents=True, exist_ok=True)
    log = cache_folder() / "gpu-check.log"
    for form in FORMS:
        # Two engines share the memory.
        options = {"gpu_memory_utilization": 0.4, "max_num_seqs": 64}
        for found in measure(form, 0.4, 3, log, LLAMA_2_7B, (1, 8, 64), **options):
            # Of the engine's process alone, not of the GPU.
            if "memory" not in found["case"]:
                yield row(f"whole model, {found['case']}, speed-up of {found['ideal']:.2f}", found["value"], None)


def main() -> int:
    """Run all; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description="Check the Triton kernels on this GPU, and time them.")
    parser.add_argument("--dry-run", action="store_true", help="list the checks; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="fewer layers and numbers of tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    count, tokens_of = (30, (1, 64, 512)) if arguments.quick else (RANDOM_LAYERS, TOKENS)
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    if arguments.dry_run:
        print(
            f"{3 * count} random layers, and with weights of 8 bits; {len(LAYERS)} layers of Llama-2-7B, "
            f"{REPEATS} repeats; {len(REMOVED)} shares at {', '.join(map(str, tokens_of))} tokens"
        )
        return 0
    if not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run needs none", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    overlap = can_overlap(device)
    print(f"{torch.cuda.get_device_name(device)}, {major}.{minor}, overlap {'on' if overlap else 'off'}")
    rows: list[Row] = []
    wrong = 0
    for part in (
        correctness(device, overlap, count),
        real_layers(device, overlap),
        in_graphs(device, overlap),
        speed(device, overlap, tokens_of),
        fp8_speed(device, overlap),
        tuned(device, overlap),
        *((whole_model(), *([] if arguments.quick else [servers()])) if can_serve() else ()),
    ):
        for found in part:
            rows.append(found)
            missed = "" if found["bar"] is None else f"  bar {found['bar']:g} {'ok' if found['ok'] else 'MISSED'}"
            print(f"{found['case']:74} {found['value']:9.3f}{missed}", flush=True)
            wrong += found["bar"] == 0 and not found["ok"]
            write_rows(arguments.json, rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
