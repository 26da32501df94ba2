"""The fastest tiles of a layer on this GPU, each candidate checked against float64 and then timed.

The down product's tile is chosen with the usual one of the up products, then the parts of its sums, then the
up products' tile; at last the two launches are compared with the vendor's library.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pgsvd_vllm.kernels.launch import REFUSALS, Workspace, room, run, run_library
from pgsvd_vllm.kernels.packed import PackedLayer
from pgsvd_vllm.kernels.reference import layer_difference
from pgsvd_vllm.kernels.sizes import Shard, Sizes
from pgsvd_vllm.kernels.tiles import MOST_TOKENS, Step, Steps, Tile, Tiles, usual_tiles
from pgsvd_vllm.kernels.timing import COPY_BYTES, Call, seconds

TOKENS = (1, 16, 32, 64, 128, MOST_TOKENS)
SPLITS = (1, 2, 4, 8, 16)
# Unless it saves this share of the time, another choice than the usual one is noise.
LEAST_GAIN = 0.02


class RandomLayer:
    """A layer of random numbers, as PackedLayer takes it.

    Attributes:
        readers, ups, places: of its shards.
    """

    def __init__(self, shards: Sequence[Shard], columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.readers: list[torch.Tensor] = []
        self.ups: list[torch.Tensor | None] = []
        self.places: list[torch.Tensor | None] = []

        def weight(rows: int, width: int) -> torch.Tensor:
            return torch.randn(rows, width, device=device, dtype=dtype) / max(width, 1) ** 0.5

        for shard in shards:
            own = shard.pivots or 0
            self.readers.append(weight(shard.out if shard.rank is None else shard.rank, columns))
            self.ups.append(None if shard.rank is None else weight(shard.out - own, shard.rank))
            place = None
            if shard.rank is not None and shard.pivots is not None:
                taken = torch.randperm(shard.rank, device=device)[:own]
                place = torch.cat([torch.arange(shard.out - own, device=device), -1 - taken])
                place = place[torch.randperm(shard.out, device=device)]
            self.places.append(place)

    def pack(self) -> PackedLayer:
        """Its weights as the kernels take them."""
        return PackedLayer(self.readers, self.ups, self.places)


# Of up to so many tokens, of the down product and of the up products: (block_m, block_out, block_k, warps, stages), and
# `swap`. With bf16 none spills registers on sm_80 to sm_100 and gfx942 (benchmarks/kernel_resources.py --candidates).
SHAPES = {
    16: (
        ((16, 16, 128, 4, 4), (16, 16, 256, 4, 3), (16, 32, 64, 4, 5), (16, 32, 128, 4, 3), (16, 32, 256, 4, 3))
        + ((16, 64, 128, 4, 3),),
        ((16, 16, 128, 4, 3), (16, 16, 256, 4, 2), (16, 32, 64, 4, 4), (16, 32, 256, 4, 2), (16, 64, 64, 4, 3))
        + ((16, 64, 128, 4, 3),),
        False,
    ),
    32: (
        ((32, 64, 64, 4, 4), (32, 64, 128, 4, 2), (32, 128, 64, 4, 3)),
        ((32, 64, 64, 4, 3), (32, 64, 128, 4, 2)),
        True,
    ),
    64: (
        ((32, 64, 64, 4, 4), (32, 64, 128, 4, 2), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3)),
        ((32, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 128, 4, 2), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3)),
        True,
    ),
    MOST_TOKENS: (
        ((64, 64, 64, 4, 4), (64, 64, 128, 4, 2), (64, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4)),
        ((64, 128, 64, 4, 4), (64, 128, 64, 8, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        False,
    ),
}


def candidates(tokens: int, usual: Tiles, amd: bool = False) -> tuple[list[Tile], list[Tile]]:
    """Tiles to try besides the usual ones: of the down product, with the usual one's parts, and of the up products.

    Args:
        tokens: of TOKENS.
        usual: the usual tiles there.
        amd: two stages, as the usual tiles have.
    """
    downs, ups, swap = SHAPES[next(most for most in SHAPES if tokens <= most)]

    def tiles(one: Tile, shapes: Sequence[tuple[int, int, int, int, int]]) -> list[Tile]:
        found = [Tile(*shape[:4], 2 if amd else shape[4], one.split_k, swap) for shape in shapes]
        return [tile for tile in dict.fromkeys(found) if tile != one]

    return tiles(usual[0], downs), tiles(usual[1], ups)


@dataclass(frozen=True)
class Finding:
    """The best of one layer at one number of tokens.

    Attributes:
        step: for the table.
        usual, best, library: seconds of the usual tiles, of the best ones, and of the vendor's library.
        refused: tiles that could not be compiled or did not fit the device.
        wrong: tiles whose result was wrong; none ought to be.
    """

    step: Step
    usual: float
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
        clock: seconds of one of several calls on a device.

    Raises:
        ValueError: the kernels cannot take such a layer.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
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
        self.space = Workspace(device)
        self.refused = 0
        self.wrong: list[str] = []

    @property
    def sizes(self) -> Sizes:
        """The layer's entry in a table."""
        return self.layers[0].sizes

    def step(self, tokens: int) -> Finding:
        """The best for one number of tokens.

        Raises:
            ValueError: the usual tiles compute something wrong on this GPU, or cannot be compiled for it.
        """
        self.refused, self.wrong = 0, []
        layer = self.layers[0]
        x = torch.randn(tokens, layer.columns, device=self.device).to(layer.dtype)
        rows, columns = len(layer.v), layer.columns
        amd = bool(torch.version.hip)
        tiles = usual_tiles(tokens, rows, columns, amd)
        usual = self._time(tiles, x)
        if usual is None:
            raise ValueError(f"the usual tiles fail on this GPU: {', '.join(self.wrong) or 'they do not fit'}")
        best = usual
        downs, ups = candidates(tokens, tiles, amd)

        def better(tried: Iterator[Tiles]) -> None:
            nonlocal tiles, best
            for pair in tried:
                taken = self._time(pair, x)
                if taken is not None and taken < best * (1 - LEAST_GAIN):
                    tiles, best = pair, taken

        better((tile, tiles[1]) for tile in downs)
        down = tiles[0]
        better(
            (replace(down, split_k=parts), tiles[1])
            for parts in SPLITS
            # Each part has two steps at least.
            if parts != down.split_k and columns >= 2 * down.block_k * parts
        )
        if layer.ranks:
            better((tiles[0], tile) for tile in ups)
        library = self.clock([lambda one=one: run_library(x, one) for one in self.layers], self.device)  # type: ignore[misc]
        step = Step(tokens, tiles if best <= library else None)
        return Finding(step, usual, best, library, self.refused, self.wrong)

    def _time(self, tiles: Tiles, x: torch.Tensor) -> float | None:
        """Seconds, or None of what does not fit the device or is wrong."""
        self.space.grow(*room(len(self.layers[0].v), (Step(len(x), tiles),)))
        try:
            y = run(x, self.layers[0], self.space, tiles=tiles, overlap=self.overlap)
        except REFUSALS:
            self.refused += 1
            return None
        first = self.first
        wrong = layer_difference(x, first.readers, first.ups, first.places, None, y)
        if wrong:
            self.wrong.append(f"{tiles[0]}, {tiles[1]}: {wrong}")
            return None
        calls = [lambda one=one: run(x, one, self.space, tiles=tiles, overlap=self.overlap) for one in self.layers]
        return self.clock(calls, self.device)


def merged(steps: Sequence[Step]) -> Steps:
    """Steps without those whose tiles are also the next one's."""
    return (*(step for step, after in pairwise(steps) if step.tiles != after.tiles), steps[-1])
