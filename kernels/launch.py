"""A whole layer in two launches."""

import torch
import torch.nn.functional as F
import triton
from triton.errors import TritonError

from pgsvd_vllm.kernels.down import down_kernel
from pgsvd_vllm.kernels.gated import gated_kernel
from pgsvd_vllm.kernels.packed_weights import MOST_SHARDS, Gate, PackedLayer
from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.kernels.tile_heuristics import Steps, Tile, Tiles, own_tiles
from pgsvd_vllm.kernels.up import up_kernel

# Triton's errors for a kernel that it cannot compile, or not start, on a device. torch.OutOfMemoryError is a
# RuntimeError as well, but says nothing about a kernel: handlers let it pass.
REFUSALS = (TritonError, RuntimeError)
# Triton specializes kernels for addresses and integers that are multiples of this.
ALIGNED = 16


def room(rows: int, steps: Steps) -> tuple[int, int]:
    """(partial sums, counters) for the down GEMMs of a layer whose stacked matrix has so many rows."""
    numbers = tiles = 0
    for step in steps:
        down, tokens = step.tiles[0] if step.tiles else None, step.most_tokens
        # The most tokens of a step need the most room.
        if down and down.split_k > 1:
            numbers = max(numbers, down.split_k * tokens * rows)
            tiles = max(tiles, triton.cdiv(tokens, down.block_m) * triton.cdiv(rows, down.block_out))
    return numbers, tiles


class SplitKScratch:
    """The memory of split-K sums, for all layers of a stream, which run one after the other.

    Attributes:
        partials: float32.
        counters: int32, zero between launches.
    """

    def __init__(self, device: torch.device) -> None:
        # Captured graphs may still write the outgrown tensors.
        self._outgrown: list[torch.Tensor] = []
        self.partials = torch.empty(1, dtype=torch.float32, device=device)
        self.counters = torch.zeros(1, dtype=torch.int32, device=device)

    def grow(self, numbers: int, tiles: int) -> None:
        """Have room for so many partial sums and counters; sizes double, which bounds the outgrown memory."""
        if numbers > len(self.partials):
            self._outgrown.append(self.partials)
            self.partials = self.partials.new_empty(max(numbers, 2 * len(self.partials)))
        if tiles > len(self.counters):
            self._outgrown.append(self.counters)
            self.counters = self.counters.new_zeros(max(tiles, 2 * len(self.counters)))


def can_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: NVIDIA's from Hopper on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def run(
    x: torch.Tensor,
    layer: PackedLayer,
    scratch: SplitKScratch,
    bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    overlap: bool = False,
    collective: Collective | None = None,
) -> torch.Tensor:
    """The layer's outputs.

    Args:
        x: [tokens, in]; copied only if the elements of a row are not contiguous, or rows not aligned as at load.
        bias: [out] or None.
        tiles: in place of `own_tiles`.
        overlap: start the up GEMM while the down GEMM ends; see `can_overlap`.
        collective: completes z between the GEMMs, if the layer was packed for one.

    Returns:
        [tokens, out] in x's dtype.

    Raises:
        ValueError: x or the bias does not fit the layer.
    """
    x = aligned(x, layer, bias)
    y = x.new_empty(len(x), layer.out)
    if len(x) == 0:
        return y
    down, up = tiles or own_tiles(len(x), layer.sizes, amd=bool(torch.version.hip))
    above, own = layer.up_places, layer.own_places
    overlap = overlap and down is not None  # cuBLAS does not let the next kernel start
    s = _down_gemm(x, layer, scratch, down, overlap)
    z = s[:, : layer.z_rows]
    if collective is not None:
        overlap = False  # with another kernel in between
        z = collective(z)
        _place_pivots(z, y, layer, bias)
    empty = [0] * (MOST_SHARDS - len(layer.ranks))
    blocks = sum(triton.cdiv(height, up.block_out) for height in layer.heights)
    if own is not None:
        blocks += triton.cdiv(len(own), up.block_out)
    if not blocks:
        return y
    up_kernel[blocks, triton.cdiv(len(x), up.block_m)](
        *(z, layer.u, z if layer.u_scale is None else layer.u_scale, y, z if above is None else above),
        *(z if bias is None else bias, s, z if own is None else own),
        *(len(x), s.shape[1], z.stride(0), s.stride(0), y.stride(0)),
        *(*layer.heights, *empty, *layer.ranks, *empty, *layer.offsets, *empty),
        BLOCK_M=up.block_m,
        BLOCK_N=up.block_out,
        BLOCK_K=up.block_k,
        SHARDS=max(len(layer.ranks), 1),
        SWAP=up.swap,
        HAS_PLACES=above is not None,
        HAS_BIAS=bias is not None,
        HAS_OWN=own is not None,
        SCALED=layer.u_scale is not None,
        PDL=overlap,
        num_warps=up.warps,
        num_stages=up.stages,
        **_extra(overlap),
    )
    return y


def run_gated(
    x: torch.Tensor,
    layer: PackedLayer,
    gate: Gate,
    scratch: SplitKScratch,
    bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """silu(first shard's outputs) * second shard's; arguments and errors as of `run`.

    Returns:
        [tokens, out / 2] in x's dtype.
    """
    x = aligned(x, layer, bias)
    y = x.new_empty(len(x), gate.half)
    if len(x) == 0:
        return y
    down, up = tiles or own_tiles(len(x), layer.sizes, gated=True, amd=bool(torch.version.hip))
    overlap = overlap and down is not None
    z = _down_gemm(x, layer, scratch, down, overlap)
    gated_kernel[triton.cdiv(gate.half, up.block_out), triton.cdiv(len(x), up.block_m)](
        *(z, layer.u, z if layer.u_scale is None else layer.u_scale, y),
        *(z if gate.places is None else gate.places, z if bias is None else bias),
        *(len(x), z.stride(0), gate.half, gate.height, *gate.ranks, *gate.starts),
        BLOCK_M=up.block_m,
        BLOCK_N=up.block_out,
        BLOCK_K=up.block_k,
        SWAP=up.swap,
        HAS_PLACES=gate.places is not None,
        HAS_BIAS=bias is not None,
        SCALED=layer.u_scale is not None,
        PDL=overlap,
        num_warps=up.warps,
        num_stages=up.stages,
        **_extra(overlap),
    )
    return y


def aligned(x: torch.Tensor, layer: PackedLayer, bias: torch.Tensor | None) -> torch.Tensor:
    """x with contiguous rows, aligned as at load; raises ValueError if x or the bias does not fit the layer.

    Triton compiles a kernel of its own for addresses or strides that are no multiples of 16. Compiling while a graph is
    captured may fail, so such inputs are copied.
    """
    if x.ndim != 2 or x.shape[1] != layer.columns or x.dtype != layer.dtype:
        raise ValueError(f"inputs of {x.dtype} {tuple(x.shape)} for {layer.columns} columns of {layer.dtype}")
    if bias is not None and (bias.shape != (layer.out,) or not bias.is_contiguous()):
        raise ValueError(f"a bias of {tuple(bias.shape)} for {layer.out} outputs")
    usual = x.data_ptr() % ALIGNED == 0 and (x.stride(0) % ALIGNED == 0) == (layer.columns % ALIGNED == 0)
    return x if x.stride(1) == 1 and usual else x.clone(memory_format=torch.contiguous_format)


def _extra(overlap: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlap else {}


def _down_gemm(
    x: torch.Tensor, layer: PackedLayer, scratch: SplitKScratch, down: Tile | None, overlap: bool
) -> torch.Tensor:
    """x v^T, [tokens, rows of v], in the first launch or, without a tile, by cuBLAS."""
    if down is None:
        if layer.v_scale is not None:
            raise ValueError("cuBLAS does not multiply weights of 8 bits; give a tile for the down GEMM")
        return F.linear(x, layer.v)
    tokens, rows = len(x), len(layer.v)
    s = x.new_empty(tokens, rows)
    grid = triton.cdiv(rows, down.block_out), down.split_k, triton.cdiv(tokens, down.block_m)
    if down.split_k > 1 and (
        scratch.partials.numel() < down.split_k * tokens * rows or scratch.counters.numel() < grid[0] * grid[2]
    ):
        raise ValueError(f"the scratch is too small for {tokens} tokens in {down.split_k} parts")
    down_kernel[grid](
        *(x, layer.v, s if layer.v_scale is None else layer.v_scale, s, scratch.partials, scratch.counters),
        *(tokens, rows, layer.columns, x.stride(0)),
        BLOCK_M=down.block_m,
        BLOCK_R=down.block_out,
        BLOCK_K=down.block_k,
        SPLIT_K=down.split_k,
        SWAP=down.swap,
        EVEN_K=layer.columns % down.block_k == 0,
        SCALED=layer.v_scale is not None,
        PDL=overlap,
        num_warps=down.warps,
        num_stages=down.stages,
        **_extra(overlap),
    )
    return s


def _place_pivots(z: torch.Tensor, y: torch.Tensor, layer: PackedLayer, bias: torch.Tensor | None) -> None:
    """Scatter the outputs that are components of z, after the collective."""
    if layer.pivots is None or layer.pivot_columns is None:
        return
    part = z.index_select(1, layer.pivots)
    y.index_copy_(1, layer.pivot_columns, part if bias is None else part.add_(bias[layer.pivot_columns]))
