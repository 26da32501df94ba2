"""Tuning in Triton's interpreter: its real kernels and checks, with a clock that prefers what the test wants found.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_tune.py FOLDER

There is no time to measure in an interpreter. The table is written into FOLDER, and layers read it back.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from triton.errors import TritonError

from tests.kernels.interpreter import prepare

CPU = torch.device("cpu")


class Clock:
    """Says of a pair of tiles the time that `times` has, else 1 second; of cuBLAS 2."""

    def __init__(self) -> None:
        self.times: dict[Any, float] = {}
        self.seen: list[Any] = []
        self.library = 2.0

    def __call__(self, calls: Sequence[Any], device: torch.device) -> float:
        asked.clear()
        calls[0]()
        if not asked:
            return self.library
        self.seen.append(asked[0])
        assert len(calls) == 3
        return self.times.get(asked[0], 1.0)


asked: list[Any] = []
broken: dict[Any, str] = {}


def spy(run: Any) -> Any:
    """`run`, noting its tiles, and failing as `broken` says."""

    def noted(*arguments: Any, tiles: Any, **options: Any) -> torch.Tensor:
        asked.append(tiles)
        if broken.get(tiles[0]) == "does not fit":
            raise TritonError
        if broken.get(tiles[0]) == "out of memory":
            raise torch.OutOfMemoryError
        y = run(*arguments, tiles=tiles, **options)
        return y + 1 if broken.get(tiles[0]) == "wrong" else y

    return noted


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: {found}, not {wanted}")


def expect_out_of_memory(work: Callable[[], object], what: str) -> None:
    """torch.OutOfMemoryError says nothing about a tile: it must reach the caller."""
    try:
        work()
    except torch.OutOfMemoryError:
        return
    raise SystemExit(f"{what}: out of memory is not reported")


def check_search() -> Any:
    """The best of each search is found, what fails is not taken, the library is where it is faster."""
    from pgsvd_vllm.kernels import autotune as tune
    from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
    from pgsvd_vllm.kernels.tile_heuristics import own_tiles

    tune.run = spy(tune.run)
    shards, columns = (ShardShape(48, 17), ShardShape(40, 16, 16), ShardShape(20)), 640
    clock = Clock()
    one = (17 + 15 + 16 + 20) * columns * 2 + (48 * 32 + 24 * 16) * 2
    tuner = tune.LayerTuner(shards, columns, torch.bfloat16, CPU, False, clock, copy_bytes=2.5 * one)
    expect(tuner.sizes, layer_shape_of(shards, columns), "sizes")
    down, up = own_tiles(1, tuner.sizes)
    downs, ups = tune.candidates(1, (down, up))
    best = replace(downs[2], split_k=1)
    clock.times = {(downs[2], up): 0.9, (best, up): 0.8, (best, ups[1]): 0.7, (downs[0], up): 0.5, (downs[1], up): 0.4}
    broken.update({downs[0]: "does not fit", downs[1]: "wrong"})
    found = tuner.step(1)
    expect(found.step.tiles, (best, ups[1]), "tiles")
    expect((found.default, found.best, found.library), (1.0, 0.7, 2.0), "times")
    expect((found.refused, len(found.wrong)), (1, 1), "failures")
    clock.library = 0.6
    expect(tuner.step(16).step.tiles, None, "the library's step")
    # The down GEMM is cuBLAS's, the up GEMMs are ours.
    clock.times[(None, up)] = 0.5
    expect(tuner.step(1).step.tiles, (None, up), "mixed tiles")
    # If cuBLAS is the default, its time is the default's.
    found_many = tuner.step(128)
    expect((found_many.default, found_many.step.tiles), (0.6, None), "the default choice")
    del clock.times[(None, up)]
    broken.clear()
    clock.library = 2.0
    steps = tune.merged([tuner.step(tokens).step for tokens in (1, 16, 32)])
    expect([step.most_tokens for step in steps], [16, 32], "merged steps")
    broken[down] = "wrong"
    try:
        tuner.step(1)
    except ValueError as error:
        expect(str(error).startswith("the default tiles fail on this GPU: Tile("), True, str(error))
    else:
        raise SystemExit("default tiles that are wrong are used")
    broken[down] = "out of memory"
    expect_out_of_memory(lambda: tuner.step(1), "tuning")
    broken.clear()
    for shape in ((ShardShape(30),), (ShardShape(17, 17, 17), ShardShape(9, 4))):
        expect(
            tune.LayerTuner(shape, 64, torch.float16, CPU, False, clock, 0).sizes, layer_shape_of(shape, 64), "sizes"
        )
    return tuner, found.step


def check_table(folder: Path, tuner: Any, step: Any) -> None:
    """A layer of the measured sizes uses the table's tiles, another one the defaults; both match float64."""
    from pgsvd_vllm.kernels.autotune import RandomLayer
    from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
    from pgsvd_vllm.kernels.numerics import gated_difference, layer_difference
    from pgsvd_vllm.kernels.tile_heuristics import Step, Tile, default_steps, own_tiles, tiles_for
    from pgsvd_vllm.kernels.tile_table import Table, write_table
    from pgsvd_vllm.serving.gemm.gpu import TritonGemms

    path = folder / "table.json"
    steps = (step, Step(16, None))
    gated = (ShardShape(40, 17), ShardShape(40, 16, 16))
    tiles = Tile(16, 16, 64, 4, 2, 4), Tile(16, 64, 64, 4, 2)
    both = {tuner.sizes: steps, layer_shape_of(gated, 640): (Step(1, tiles), Step(64, None), Step(256, tiles))}
    write_table(Table("cpu", both), path)
    os.environ["PGSVD_KERNEL_TABLE"] = str(path)
    similar = (ShardShape(48, 17), ShardShape(40, 16, 16), ShardShape(22))
    for shards, wanted in (
        (similar, steps),
        ((ShardShape(48, 17),), default_steps(layer_shape_of((ShardShape(48, 17),), 640))),
    ):
        layer = RandomLayer(shards, 640, torch.bfloat16, CPU)
        gemms = TritonGemms(layer.shards, has_bias=True)
        expect(gemms.steps, wanted, "steps")
        for tokens in (0, 1, 5, 40):
            x = torch.randn(tokens, 640).bfloat16()
            wrong = layer_difference(x, layer.shards, None, gemms(x))
            expect(wrong, "", f"{tokens} tokens")
    from pgsvd_vllm.serving.gemm import gpu

    run = gpu.run

    def without_memory(*arguments: Any) -> torch.Tensor:
        if arguments[4] == step.tiles:
            raise torch.OutOfMemoryError
        return run(*arguments)

    gpu.run = without_memory
    layer = RandomLayer(similar, 640, torch.bfloat16, CPU)
    expect_out_of_memory(lambda: TritonGemms(layer.shards, has_bias=True), "a layer with a table's tiles")
    gpu.run = run
    # With the activation all but the down tile are the defaults.
    layer = RandomLayer(gated, 640, torch.bfloat16, CPU)
    gemms = TritonGemms(layer.shards, True, lambda y: silu(y[:, :40]) * y[:, 40:])
    for tokens in (1, 5, 40, 70, 256):
        own = own_tiles(tokens, gemms.layer.sizes, gated=True)
        wanted = (tiles[0], own[1]) if tokens == 1 else own if tokens == 5 else None
        expect(tiles_for(gemms.steps, tokens), wanted, f"a gate's tiles for {tokens} tokens")
        x = torch.randn(tokens, 640).bfloat16()
        wrong = gated_difference(x, layer.shards, None, gemms(x))
        expect(wrong, "", f"a gate, {tokens} tokens")


def main(folder: Path) -> None:
    prepare(0)
    torch.manual_seed(0)
    check_table(folder, *check_search())
    print("tuned")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
