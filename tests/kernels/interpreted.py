"""Random layers through the Triton kernels in Triton's interpreter, against float64.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py SEED CASES [FOLDER]

FOLDER holds down.py, up.py, gated.py and permute.py to take instead of the project's. Ends with an error at the first
wrong number.
"""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from pgsvd_vllm.kernels.layer_shape import ShardShape
from pgsvd_vllm.kernels.numerics import gated_difference, layer_difference
from pgsvd_vllm.kernels.packed_weights import Gate, PackedLayer
from pgsvd_vllm.kernels.quantized_matrix import Matrix
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.kernels.tile_heuristics import Tile, Tiles

TOKENS = (0, 1, 2, 3, 5, 8, 16, 17, 33, 67)
COLUMNS = (16, 24, 40, 64, 96, 100, 129, 256, 300)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the weights; None for that of the inputs.
WEIGHTS = (None, None, torch.int8, torch.float8_e4m3fn)


def replace_kernels(folder: Path) -> None:
    for name in ("down", "up", "gated", "permute"):
        module = f"pgsvd_vllm.kernels.{name}"
        spec = importlib.util.spec_from_file_location(module, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class Layer:
    """A random layer and what it computes, in float64.

    Attributes:
        shards: its weights.
    """

    def __init__(
        self, rng: random.Random, dtype: torch.dtype, columns: int, weights: torch.dtype | None = None
    ) -> None:
        from pgsvd_vllm.kernels.autotune import rounded

        forms = ["dense", "factors", "pivot"]
        kinds = [rng.choice(forms) for _ in range(rng.choice([1, 1, 2, 3]))]
        if "factors" not in kinds and "pivot" not in kinds:
            kinds[rng.randrange(len(kinds))] = rng.choice(forms[1:])
        self.shards: list[Shard[Matrix]] = []
        self.outs = []
        for kind in kinds:
            out, rank = rng.choice([1, 2, 7, 16, 31, 48, 97, 113, 150]), rng.choice([1, 1, 3, 15, 16, 17, 40, 64, 89])
            if kind == "pivot":
                # Sometimes all of a tensor-parallel rank's rows are pivots, and not all pivots are its rows.
                out = max(out, rank + rng.choice([0, 1, 1, 1]))
            self.outs.append(out)
            down = (torch.randn(out if kind == "dense" else rank, columns) / columns**0.5).to(dtype)
            rows = out - rank if kind == "pivot" else out
            up = None if kind == "dense" else (torch.randn(rows, rank) / rank**0.5).to(dtype)
            mine = rng.randint(1, rank) if rng.random() < 0.3 else rank
            found = torch.cat([torch.arange(rows), -1 - torch.randperm(rank)[:mine]])
            self.outs[-1] = len(found) if kind == "pivot" else out
            places = found[torch.randperm(len(found))] if kind == "pivot" else None
            if weights is None:
                self.shards.append(Shard(down, up, places))
            else:
                self.shards.append(Shard(rounded(down, weights), None if up is None else rounded(up, weights), places))

    def difference(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> str:
        """What is wrong with an output; empty if nothing is."""
        return layer_difference(x, self.shards, bias, y)


def random_tiles(rng: random.Random, library: bool = True) -> Tiles:
    """Tiles; with `library` sometimes none of the down GEMM."""
    blocks = [16, 32, 64]
    parts = rng.choice([1, 2, 3, 5])
    down = Tile(rng.choice([16, 32]), rng.choice(blocks), rng.choice(blocks), 4, 2, parts, rng.random() < 0.5)
    return (
        down if rng.random() < 0.8 or not library else None,
        Tile(rng.choice([16, 32]), rng.choice(blocks), rng.choice(blocks), 4, 2, 1, rng.random() < 0.5),
    )


def room(packed: PackedLayer, tokens: int, down: Tile | None) -> Any:
    """A scratch that is just large enough, poisoned."""
    from pgsvd_vllm.kernels.launch import SplitKScratch

    scratch = SplitKScratch(torch.device("cpu"))
    if down is None:
        return scratch
    rows, tiles = len(packed.v), -(-tokens // down.block_m) * -(-len(packed.v) // down.block_out)
    scratch.partials = poisoned(down.split_k * tokens * rows + 1, dtype=torch.float32)
    scratch.counters = torch.zeros(tiles + 1, dtype=torch.int32)
    return scratch


def scaled_gemms(packed: PackedLayer) -> Any:
    """What vLLM's GEMMs of 8-bit weights compute on a GPU, without the rounding of their inputs; None for others."""
    heights = [len(packed.v), *packed.heights]
    return [
        lambda x, m=m, height=height: (x.double() @ m.double().T).to(x.dtype)[:, :height]
        for m, height in zip(packed.quantized(), heights, strict=False)
    ] or None


def check_one(rng: random.Random) -> None:
    from pgsvd_vllm.kernels import launch
    from pgsvd_vllm.kernels.cublas import run_library
    from pgsvd_vllm.kernels.packed_weights import PackedLayer
    from tests.kernels.interpreter import watch

    dtype, tokens, columns = rng.choice(DTYPES), rng.choice(TOKENS), rng.choice(COLUMNS)
    weights = rng.choice(WEIGHTS)
    layer = Layer(rng, dtype, columns, weights)
    packed = PackedLayer(layer.shards, dtype=dtype)
    gap = rng.choice([0, 8, 11])
    x = torch.cat([torch.randn(tokens, columns), torch.full((tokens, gap), float("nan"))], 1).to(dtype)[:, :columns]
    bias = torch.randn(sum(layer.outs)).to(dtype) if rng.random() < 0.5 else None
    down, up = random_tiles(rng, weights is None)
    scratch = room(packed, tokens, down)
    described = (
        f"{dtype}, weights {weights}, {tokens} tokens, {columns} columns, ranks {packed.ranks}, outputs {layer.outs}, "
        f"{down}, {up}"
    )
    before, overlap = watch.launches, rng.random() < 0.5
    try:
        y = launch.run(x, packed, scratch, bias, (down, up), overlap)
        launches = watch.launches - before
        again = launch.run(x, packed, scratch, bias, (down, up), overlap)
        ordered = run_library(x, packed, bias, kernels=True, gemms=scaled_gemms(packed))
    except Exception as error:
        raise SystemExit(f"{described}: {error}") from error
    wrong = layer.difference(x, bias, y) or layer.difference(x, bias, ordered)
    if wrong:
        raise SystemExit(f"{described}: {wrong}")
    if launches != ((2 if down else 1) if tokens else 0):
        raise SystemExit(f"{described}: {launches} launches")
    if not torch.equal(y, again) or scratch.counters.any():
        raise SystemExit(f"{described}: the second run differs, or counters are left")


def gated_layer(rng: random.Random, dtype: torch.dtype, columns: int, weights: torch.dtype | None) -> Any:
    """Two shards of the same outputs, of any form."""
    from pgsvd_vllm.kernels.autotune import RandomLayer

    half = rng.choice([1, 7, 16, 31, 48, 97])
    shards = []
    for _ in range(2):
        kind, rank = rng.choice(["dense", "factors", "pivot", "pivot"]), rng.choice([1, 3, 15, 16, 17, 40])
        # Sometimes all outputs are pivots, and not all pivots are outputs.
        own = min(half, rng.choice([rank, rank, rng.randint(1, rank)]))
        shards.append(ShardShape(half, None if kind == "dense" else rank, own if kind == "pivot" else None))
    return RandomLayer(shards, columns, dtype, torch.device("cpu"), weights)


def check_gated(rng: random.Random) -> None:
    """A gate and what it gates."""
    from pgsvd_vllm.kernels import launch
    from pgsvd_vllm.kernels.cublas import run_library_gated
    from tests.kernels.interpreter import watch

    dtype, tokens, columns = rng.choice(DTYPES), rng.choice(TOKENS), rng.choice(COLUMNS)
    weights = rng.choice(WEIGHTS)
    layer = gated_layer(rng, dtype, columns, weights)
    packed = layer.pack()
    gate = Gate(packed, layer.shards)
    # Gates of all sizes, up to where SiLU's exponential overflows; fp16 would not hold their gemms.
    x = (torch.randn(tokens, columns) * rng.choice([0.1, 1, 30, 30 if dtype == torch.float16 else 300])).to(dtype)
    bias = torch.randn(packed.out).to(dtype) if rng.random() < 0.5 else None
    down, up = random_tiles(rng, weights is None)
    scratch = room(packed, tokens, down)
    described = (
        f"gated, {dtype}, weights {weights}, {tokens} tokens, {columns} columns, half {gate.half}, "
        f"ranks {gate.ranks}, {down}, {up}"
    )
    before, overlap = watch.launches, rng.random() < 0.5
    try:
        y = launch.run_gated(x, packed, gate, scratch, bias, (down, up), overlap)
        launches = watch.launches - before
        again = launch.run_gated(x, packed, gate, scratch, bias, (down, up), overlap)
        gemms = scaled_gemms(packed)
        ordered = y if packed.sources is None else run_library_gated(x, packed, gate, bias, gemms)
    except Exception as error:
        raise SystemExit(f"{described}: {error}") from error
    wrong = gated_difference(x, layer.shards, bias, y)
    wrong = wrong or gated_difference(x, layer.shards, bias, ordered)
    if wrong:
        raise SystemExit(f"{described}: {wrong}")
    if launches != ((2 if down else 1) if tokens else 0):
        raise SystemExit(f"{described}: {launches} launches")
    if not torch.equal(y, again) or scratch.counters.any():
        raise SystemExit(f"{described}: the second run differs, or counters are left")


def silu_and_mul(y: torch.Tensor) -> torch.Tensor:
    gate, other = y.chunk(2, 1)
    return torch.nn.functional.silu(gate) * other


def check_gemms(rng: random.Random) -> None:
    """The GEMMs of a layer on a GPU, with an activation or without: the kernels for few tokens, a library for many."""
    from pgsvd_vllm.serving.gemm import gpu
    from pgsvd_vllm.serving.vllm_compat.cpu_gemm import Gemm

    # Not vLLM's, which run on GPUs alone.
    gpu.quantized_gemm = lambda matrix, dtype: Gemm(
        lambda x, bias: (x.double() @ matrix.double().T).to(dtype), [matrix.values, matrix.scale]
    )
    for weights in WEIGHTS[1:]:
        layer = Layer(rng, torch.bfloat16, 64, weights)
        gated = gated_layer(rng, torch.bfloat16, 64, weights)
        gemms = gpu.TritonGemms(layer.shards, True, dtype=torch.bfloat16)
        silu = gpu.TritonGemms(gated.shards, True, silu_and_mul, dtype=torch.bfloat16)
        for tokens in (0, 1, 20, 70, 300):
            x = torch.randn(tokens, 64).bfloat16()
            wrong = layer.difference(x, None, gemms(x)) or gated_difference(x, gated.shards, None, silu(x))
            if wrong:
                raise SystemExit(f"{tokens} tokens, weights {weights}: {wrong}")


def main(seed: int, cases: int) -> None:
    from tests.kernels.interpreter import prepare

    prepare(seed)
    torch.manual_seed(seed)
    # Every output must be written: what is allocated is poison first.
    empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda self, *shape, **options: (  # type: ignore[method-assign]
        empty(self, *shape, **options) if options else poisoned(*shape, dtype=self.dtype)
    )
    rng = random.Random(seed)
    for number in range(cases):
        check_one(rng) if number % 3 else check_gated(rng)
    check_gemms(rng)
    print(f"{cases} layers")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        replace_kernels(Path(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]))
