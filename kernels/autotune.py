"""Finds the fastest tiles of a layer on this GPU; each candidate is checked against float64 and then timed.

The search chooses the down GEMM's tile with the default up tile, then its split-K or cuBLAS in its place, then the up
GEMMs' tile. At the end it compares the two launches with cuBLAS for the whole layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch

from pgsvd_vllm.kernels.cublas import run_library
from pgsvd_vllm.kernels.cuda_timer import COPY_BYTES, Call, seconds
from pgsvd_vllm.kernels.launch import REFUSALS, SplitKScratch, room, run
from pgsvd_vllm.kernels.layer_shape import LayerShape, ShardShape
from pgsvd_vllm.kernels.numerics import layer_difference
from pgsvd_vllm.kernels.packed_weights import PackedLayer
from pgsvd_vllm.kernels.quantized_matrix import Matrix, QuantizedMatrix
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.kernels.tile_heuristics import (
    MOST_TOKENS,
    Step,
    Steps,
    Tile,
    Tiles,
    default_steps,
    own_tiles,
    tiles_for,
)

TOKENS = (1, 16, 32, 64, 128, MOST_TOKENS)
SPLITS = (1, 2, 4, 8, 16)
# A choice that saves less than this fraction of the default's time is noise.
LEAST_GAIN = 0.02


class RandomLayer:
    """A layer of random weights.

    Args:
        shards, columns: its sizes.
        dtype: of the inputs, and of the weights without `bits8`.
        device: of the weights.
        bits8: int8 or float8_e4m3fn, to quantize the weights to.

    Attributes:
        shards: its weights.
    """

    def __init__(
        self,
        shards: Sequence[ShardShape],
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        bits8: torch.dtype | None = None,
    ) -> None:
        self.shards: list[Shard[Matrix]] = []
        self._dtype = dtype

        def weight(rows: int, width: int) -> Matrix:
            matrix = torch.randn(rows, width, device=device, dtype=dtype) / max(width, 1) ** 0.5
            return matrix if bits8 is None else rounded(matrix, bits8)

        for shard in shards:
            own = shard.pivots or 0
            down = weight(shard.out if shard.rank is None else shard.rank, columns)
            up = None if shard.rank is None else weight(shard.out - own, shard.rank)
            place = None
            if shard.rank is not None and shard.pivots is not None:
                taken = torch.randperm(shard.rank, device=device)[:own].sort().values
                # As in a checkpoint, pivots and the other rows ascend.
                place = torch.arange(shard.out, device=device)
                outputs = torch.randperm(shard.out, device=device)[:own].sort().values
                others = torch.ones(shard.out, dtype=torch.bool, device=device)
                others[outputs] = False
                place[others] = torch.arange(shard.out - own, device=device)
                place[outputs] = -1 - taken
            self.shards.append(Shard(down, up, place))

    def pack(self) -> PackedLayer:
        """Its weights as the kernels take them."""
        return PackedLayer(self.shards, dtype=self._dtype)


def rounded(matrix: torch.Tensor, dtype: torch.dtype) -> QuantizedMatrix:
    """A matrix [rows, columns] rounded to int8 or float8_e4m3fn, with one scale a row that clips nothing."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = matrix.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    exact = matrix.float() / scale
    return QuantizedMatrix((exact.round() if dtype == torch.int8 else exact).to(dtype), scale, 8)


# Up to so many tokens -> tiles of the down GEMM and of the up GEMMs: block_m, block_out, block_k, warps, stages and
# swap. With bf16 none spills registers on sm_80 to sm_100 and gfx942 (benchmarks/kernel_resources.py --candidates).
Shape = tuple[int, int, int, int, int, bool]
SHAPES: dict[int, tuple[tuple[Shape, ...], tuple[Shape, ...]]] = {
    16: (
        ((16, 64, 64, 4, 6, True), (16, 128, 64, 4, 5, True), (16, 32, 128, 2, 4, False), (16, 32, 128, 4, 3, False))
        + ((16, 16, 128, 2, 5, False),),
        ((16, 64, 64, 4, 4, True), (16, 64, 128, 4, 3, False), (16, 32, 128, 2, 4, False), (16, 16, 128, 2, 5, False)),
    ),
    32: (
        ((32, 64, 64, 4, 6, True), (32, 128, 64, 4, 4, True), (32, 32, 128, 4, 4, False)),
        ((32, 64, 64, 4, 4, True), (32, 64, 128, 4, 4, True), (32, 32, 128, 4, 4, False)),
    ),
    64: (
        ((64, 64, 64, 4, 4, True), (64, 64, 128, 4, 3, True), (64, 32, 128, 4, 4, False), (64, 128, 64, 4, 4, True)),
        ((64, 64, 64, 4, 4, True), (64, 64, 128, 4, 3, True), (64, 32, 128, 4, 3, False), (64, 128, 64, 4, 3, True)),
    ),
    MOST_TOKENS: (
        ((64, 64, 64, 4, 4, True), (128, 64, 64, 4, 4, False)),
        ((64, 128, 64, 4, 4, False), (128, 128, 64, 8, 3, False)),
    ),
}


def candidates(tokens: int, own: Tiles, amd: bool = False) -> tuple[list[Tile], list[Tile]]:
    """Tiles to try besides the defaults: of the down GEMM, with the default's split-K, and of the up GEMMs.

    Args:
        tokens: one of TOKENS.
        own: the defaults, from `own_tiles`.
        amd: use two stages, as these do.
    """
    downs, ups = SHAPES[next(most for most in SHAPES if tokens <= most)]

    def tiles(one: Tile | None, shapes: Sequence[Shape]) -> list[Tile]:
        parts = one.split_k if one else 1
        found = [Tile(*shape[:4], 2 if amd else shape[4], parts, shape[5]) for shape in shapes]
        return [tile for tile in dict.fromkeys(found) if tile != one]

    return tiles(own[0], downs), tiles(own[1], ups)


@dataclass(frozen=True)
class Finding:
    """The best tiles of one layer at one number of tokens.

    Attributes:
        step: for the table.
        default, best, library: seconds of the default choice, of the best one, and of cuBLAS.
        refused: number of tiles that could not be compiled or did not fit the device.
        wrong: tiles with a wrong result; there should be none.
    """

    step: Step
    default: float
    best: float
    library: float
    refused: int
    wrong: list[str]


class LayerTuner:
    """Tunes one layer.

    Args:
        shards, columns: its sizes.
        dtype: float16 or bfloat16.
        device: a GPU.
        overlap: as of `run`.
        clock: measures the seconds of one of several calls on a device.

    Raises:
        ValueError: the kernels do not support such a layer.
    """

    def __init__(
        self,
        shards: Sequence[ShardShape],
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        overlap: bool,
        clock: Callable[[Sequence[Call], torch.device], float] = seconds,
        copy_bytes: float = COPY_BYTES,
    ) -> None:
        self.first = RandomLayer(shards, columns, dtype, device)
        self.layers = [self.first.pack()]
        one = (len(self.layers[0].v) * columns + len(self.layers[0].u)) * dtype.itemsize
        self.layers += [RandomLayer(shards, columns, dtype, device).pack() for _ in range(int(copy_bytes / one))]
        self.device, self.overlap, self.clock = device, overlap, clock
        self.space = SplitKScratch(device)
        self.refused = 0
        self.wrong: list[str] = []

    @property
    def sizes(self) -> LayerShape:
        """The layer's entry in a table."""
        return self.layers[0].sizes

    def step(self, tokens: int) -> Finding:
        """The best tiles for one number of tokens.

        Raises:
            ValueError: the default tiles compute a wrong result on this GPU, or cannot be compiled for it.
            torch.OutOfMemoryError: the layer does not fit into the GPU's memory.
        """
        self.refused, self.wrong = 0, []
        layer = self.layers[0]
        x = torch.randn(tokens, layer.columns, device=self.device).to(layer.dtype)
        amd = bool(torch.version.hip)
        tiles = own_tiles(tokens, layer.sizes, amd=amd)
        own = self._time(tiles, x)
        if own is None:
            raise ValueError(f"the default tiles fail on this GPU: {', '.join(self.wrong) or 'they do not fit'}")
        best = own
        downs, ups = candidates(tokens, tiles, amd)

        def better(tried: Iterator[Tiles]) -> None:
            nonlocal tiles, best
            for pair in tried:
                taken = self._time(pair, x)
                if taken is not None and taken < best * (1 - LEAST_GAIN):
                    tiles, best = pair, taken

        better((tile, tiles[1]) for tile in downs)
        down = tiles[0]
        if down is not None:
            better(
                (replace(down, split_k=parts), tiles[1])
                for parts in SPLITS
                # Each part has two steps at least.
                if parts != down.split_k and layer.columns >= 2 * down.block_k * parts
            )
            # cuBLAS for the down GEMM before our up kernel.
            better(iter([(None, tiles[1])]))
        if layer.ranks:
            better((tiles[0], tile) for tile in ups)
        library = self.clock([partial(run_library, x, one, kernels=True) for one in self.layers], self.device)
        ours = tiles_for(default_steps(layer.sizes, amd=amd), tokens) is not None
        # The default of the two stays unless the other saves enough.
        chosen = best * (1 - LEAST_GAIN) <= library if ours else best < library * (1 - LEAST_GAIN)
        step = Step(tokens, tiles if chosen else None)
        return Finding(step, own if ours else library, best if chosen else library, library, self.refused, self.wrong)

    def _time(self, tiles: Tiles, x: torch.Tensor) -> float | None:
        """Seconds; None for tiles that do not fit the device or compute a wrong result."""
        self.space.grow(*room(len(self.layers[0].v), (Step(len(x), tiles),)))
        try:
            y = run(x, self.layers[0], self.space, tiles=tiles, overlap=self.overlap)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            self.refused += 1
            return None
        wrong = layer_difference(x, self.first.shards, None, y)
        if wrong:
            self.wrong.append(f"{tiles[0]}, {tiles[1]}: {wrong}")
            return None
        calls = [lambda one=one: run(x, one, self.space, tiles=tiles, overlap=self.overlap) for one in self.layers]
        return self.clock(calls, self.device)


def merged(steps: Sequence[Step]) -> Steps:
    """The steps, without each one whose tiles the next one has as well."""
    return (*(step for step, after in pairwise(steps) if step.tiles != after.tiles), steps[-1])
