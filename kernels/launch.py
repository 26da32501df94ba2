"""A whole layer in two launches: its weights as the kernels want them, and the launches.

Shards may be dense, plain factors or pivot forms, up to three, of any rank. Low-rank shards come first in the
stacked matrix that reads x, each padded to whole alignments, so that z has them and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton

from pgsvd_vllm.kernels.down import down_kernel
from pgsvd_vllm.kernels.table import Sizes
from pgsvd_vllm.kernels.tiles import ALIGNMENT, Steps, Tiles, usual_tiles
from pgsvd_vllm.kernels.up import up_kernel

MOST_SHARDS = 3
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLayer:
    """The weights of one layer, for `run`.

    Args, one entry a shard, in the order of the layer's outputs:
        readers: what reads x: a down factor [r, in], or a dense weight [out, in].
        ups: what reads the down factor's output, [rows, r]; None for a dense shard.
        places: of the pivot form int64 [out], where each output is found: i >= 0 is row i of the up
            product, -1 - j is component j of the down product. None for other shards.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there are more than MOST_SHARDS low-rank shards.
    """

    def __init__(
        self,
        readers: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor | None],
    ) -> None:
        self.columns = readers[0].shape[1]
        self.dtype, device = readers[0].dtype, readers[0].device
        self._check(readers, ups)
        outs = [
            len(place) if place is not None else len(reader if up is None else up)
            for reader, up, place in zip(readers, ups, places, strict=True)
        ]
        self.out = sum(outs)
        starts = [sum(outs[:i]) for i in range(len(outs))]
        # A rank of tensor parallelism may hold nothing but pivot rows of a shard: then there is no up product.
        low_rank = [i for i, up in enumerate(ups) if up is not None and len(up)]
        stacked, own, flat, above = [], [], [], []  # v; y's columns of its rows; u; y's columns of its rows
        self.ranks: list[int] = []
        self.heights: list[int] = []
        for i in [*low_rank, *(i for i in range(len(readers)) if i not in low_rank)]:
            reader, up, place = readers[i], ups[i], places[i]
            columns = starts[i] + torch.arange(outs[i], device=device)
            missing = -len(reader) % ALIGNMENT if i in low_rank else 0
            stacked.append(F.pad(reader, (0, 0, 0, missing)) if missing else reader)
            mine = columns.new_full((len(reader) + missing,), -1) if up is not None else columns
            theirs = columns if place is None or up is None else columns.new_zeros(len(up))
            if place is not None:
                mine[-1 - place[place < 0]] = columns[place < 0]
                theirs[place[place >= 0]] = columns[place >= 0]
            own.append(mine)
            if up is not None and i in low_rank:
                flat.append(F.pad(up, (0, missing)).reshape(-1))
                above.append(theirs)
                self.ranks.append(len(reader) + missing)
                self.heights.append(len(up))
        self.v = torch.cat(stacked).contiguous()
        self.u = torch.cat(flat).contiguous() if flat else self.v.new_empty(0)
        self.z_rows = sum(self.ranks)
        self.offsets = [starts[i] for i in low_rank]
        has_own = any(up is None or place is not None for up, place in zip(ups, places, strict=True))
        self.own_places = torch.cat(own).int() if has_own else None
        # Rows of v that are outputs of the layer by themselves.
        self.own_rows = (self.own_places >= 0).nonzero()[:, 0] if self.own_places is not None else None
        has_pivots = any(places[i] is not None for i in low_rank)
        self.up_places = torch.cat(above).int() if has_pivots else None
        # For torch's products: of every up product the columns of y, of y's columns the rows of v.
        self.up_columns = above if has_pivots else None
        self.own_columns = self.own_places[self.own_rows].long() if self.own_places is not None else None

    @property
    def sizes(self) -> Sizes:
        """What its best tiles depend on."""
        heights = sum(self.heights)
        return Sizes(self.columns, len(self.v), heights, len(self.u) // heights if heights else 0)

    def _check(self, readers: Sequence[torch.Tensor], ups: Sequence[torch.Tensor | None]) -> None:
        low_rank = [(reader, up) for reader, up in zip(readers, ups, strict=True) if up is not None]
        if len(low_rank) > MOST_SHARDS:
            raise ValueError(f"{len(low_rank)} low-rank shards; the kernels take up to {MOST_SHARDS}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype}: the kernels take float16, bfloat16 and float32")
        for tensor in (*readers, *(up for _, up in low_rank)):
            if tensor.dtype != self.dtype or tensor.ndim != 2:
                raise ValueError(f"weights of {tensor.dtype} {tuple(tensor.shape)} beside {self.dtype}")
        if any(reader.shape[1] != self.columns for reader in readers):
            raise ValueError(f"shards of different inputs: {[reader.shape[1] for reader in readers]}")
        if any(up.shape[1] != len(reader) for reader, up in low_rank):
            raise ValueError("an up factor of another rank than its down factor")


class Workspace:
    """What split sums need, for all layers of a device, which run one after the other.

    Attributes:
        partials: float32.
        counters: int32, zero between launches.
    """

    def __init__(self, device: torch.device) -> None:
        # Captured graphs may still write what was outgrown.
        self._outgrown: list[torch.Tensor] = []
        self.partials = torch.empty(1, dtype=torch.float32, device=device)
        self.counters = torch.zeros(1, dtype=torch.int32, device=device)

    def reserve(self, rows: int, steps: Steps) -> None:
        """Make room for the down products of a layer with so many rows that read x."""
        numbers = tiles = 1
        for step in steps:
            # The most tokens of a step need the most room.
            if step.tiles and step.tiles[0].split_k > 1:
                down, tokens = step.tiles[0], step.most_tokens
                numbers = max(numbers, down.split_k * tokens * rows)
                tiles = max(tiles, triton.cdiv(tokens, down.block_m) * triton.cdiv(rows, down.block_out))
        if numbers > len(self.partials) or tiles > len(self.counters):
            self._outgrown += [self.partials, self.counters]
        if numbers > len(self.partials):
            self.partials = self.partials.new_empty(numbers)
        if tiles > len(self.counters):
            self.counters = self.counters.new_zeros(tiles)


def can_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: NVIDIA's from Hopper on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def run(
    x: torch.Tensor,
    layer: PackedLayer,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """The layer's outputs.

    Args:
        x: [tokens, in]; copied only where the numbers of a row do not lie side by side.
        bias: [out] or None.
        tiles: other than the usual ones.
        overlap: start the up product's loads of weights while the down product ends; see `can_overlap`.

    Returns:
        [tokens, out] in x's dtype.

    Raises:
        ValueError: x or the bias does not fit the layer.
    """
    tokens = len(x)
    if x.ndim != 2 or x.shape[1] != layer.columns or x.dtype != layer.dtype:
        raise ValueError(f"inputs of {x.dtype} {tuple(x.shape)} for {layer.columns} columns of {layer.dtype}")
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and (bias.shape != (layer.out,) or not bias.is_contiguous()):
        raise ValueError(f"a bias of {tuple(bias.shape)} for {layer.out} outputs")
    y = x.new_empty(tokens, layer.out)
    if tokens == 0:
        return y
    rows = len(layer.v)
    down, up = tiles or usual_tiles(tokens, rows, layer.columns, amd=bool(torch.version.hip))
    z = x.new_empty(tokens, layer.z_rows)
    extra = {"launch_pdl": True} if overlap else {}
    grid = triton.cdiv(rows, down.block_out), down.split_k, triton.cdiv(tokens, down.block_m)
    if down.split_k > 1 and (
        workspace.partials.numel() < down.split_k * tokens * rows or workspace.counters.numel() < grid[0] * grid[2]
    ):
        raise ValueError(f"the workspace is too small for {tokens} tokens in {down.split_k} parts")
    own, above = layer.own_places, layer.up_places
    down_kernel[grid](
        *(x, layer.v, z, y, z if own is None else own, z if bias is None else bias),
        *(workspace.partials, workspace.counters, tokens, rows, layer.columns, layer.z_rows),
        *(x.stride(0), z.stride(0), y.stride(0)),
        BLOCK_M=down.block_m,
        BLOCK_R=down.block_out,
        BLOCK_K=down.block_k,
        SPLIT_K=down.split_k,
        SWAP=down.swap,
        EVEN_K=layer.columns % down.block_k == 0,
        HAS_PLACES=own is not None,
        HAS_BIAS=bias is not None,
        PDL=overlap,
        num_warps=down.warps,
        num_stages=down.stages,
        **extra,
    )
    if not layer.ranks:
        return y
    empty = [0] * (MOST_SHARDS - len(layer.ranks))
    blocks = sum(triton.cdiv(height, up.block_out) for height in layer.heights)
    up_kernel[blocks, triton.cdiv(tokens, up.block_m)](
        *(z, layer.u, y, z if above is None else above, z if bias is None else bias),
        *(tokens, z.stride(0), y.stride(0), *layer.heights, *empty, *layer.ranks, *empty, *layer.offsets, *empty),
        BLOCK_M=up.block_m,
        BLOCK_N=up.block_out,
        BLOCK_K=up.block_k,
        SHARDS=len(layer.ranks),
        SWAP=up.swap,
        HAS_PLACES=above is not None,
        HAS_BIAS=bias is not None,
        PDL=overlap,
        num_warps=up.warps,
        num_stages=up.stages,
        **extra,
    )
    return y


def run_library(x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `run`, by torch's products: for many tokens, and to compare with.

    Args:
        x: [tokens, in].
        bias: [out] or None.
    """
    s = F.linear(x, layer.v)
    y = x.new_empty(len(x), layer.out)
    read = written = 0
    for i, (rank, height, offset) in enumerate(zip(layer.ranks, layer.heights, layer.offsets, strict=True)):
        z, u = s[:, read : read + rank], layer.u[written : written + height * rank].view(height, rank)
        if layer.up_columns is None:
            torch.mm(z, u.T, out=y[:, offset : offset + height])
        else:
            y.index_copy_(1, layer.up_columns[i], F.linear(z, u))
        read, written = read + rank, written + height * rank
    if layer.own_rows is not None and layer.own_columns is not None:
        y.index_copy_(1, layer.own_columns, s.index_select(1, layer.own_rows))
    return y if bias is None else y.add_(bias)
