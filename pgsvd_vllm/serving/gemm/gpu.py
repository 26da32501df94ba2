"""A layer's GEMMs on GPUs: the Triton kernels for few tokens, cuBLAS for many.

Weights of 8 bits multiply few tokens as they are, and many tokens in vLLM's scaled GEMMs, which quantize x and z.

PGSVD_KERNELS=torch uses cuBLAS for all. PGSVD_KERNEL_TABLE names a file written by `pgsvd-vllm tune`; the default is
the file for this GPU in the user's cache, if there is one.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.kernels.cublas import Gemms, run_library, run_library_gated
from pgsvd_vllm.kernels.launch import REFUSALS, SplitKScratch, can_overlap, room, run, run_gated
from pgsvd_vllm.kernels.packed_weights import MOST_SHARDS, Gate, PackedLayer
from pgsvd_vllm.kernels.padding import Collective
from pgsvd_vllm.kernels.quantized_matrix import Matrix, QuantizedMatrix
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.kernels.tile_heuristics import Step, Steps, default_steps, tiles_for
from pgsvd_vllm.kernels.tile_table import Table, default_path, read_table
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.collectives import collective_of
from pgsvd_vllm.serving.gemm.cpu import OTHER_SIZES
from pgsvd_vllm.serving.vllm_compat.cpu_gemm import Gemm
from pgsvd_vllm.serving.vllm_compat.quantized_gemm import quantized_gemm

__all__ = ["TritonGemms", "can_take", "wants_triton"]
VARIABLE = "PGSVD_KERNELS"
CHOICES = ("triton", "torch")
TABLE_VARIABLE = "PGSVD_KERNEL_TABLE"
logger = logging.getLogger("vllm.pgsvd")


def wants_triton() -> bool:
    """Whether the Triton kernels compute few tokens.

    Raises:
        InputError: PGSVD_KERNELS is none of CHOICES.
    """
    chosen = os.environ.get(VARIABLE, CHOICES[0])
    if chosen not in CHOICES:
        raise InputError(f"{VARIABLE}={chosen}: must be {' or '.join(CHOICES)}")
    return chosen == "triton"


def _suits(dtype: torch.dtype, weights: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels suit inputs and weights of some dtypes on a device.

    float32 spills registers or does not fit. GPUs before Ampere lack the kernels' MMA units, those before sm_89 FP8;
    AMD's have another FP8. From sm_100 on vLLM has no INT8 GEMM for many tokens.
    """
    if dtype == torch.float32:
        return False
    if device.type != "cuda":
        return True
    is_fp8 = weights == torch.float8_e4m3fn
    if torch.version.hip:
        return not is_fp8
    capability = torch.cuda.get_device_capability(device)
    return capability >= ((8, 9) if is_fp8 else (8, 0)) and (weights != torch.int8 or capability < (10, 0))


def can_take(shards: Sequence[Shard[Matrix]], dtype: torch.dtype) -> bool:
    """Whether TritonGemms takes a layer's shards: those of 8 bits only if Triton reads them on this GPU.

    Args:
        shards: of the layer.
        dtype: of the inputs.
    """
    if sum(shard.up is not None for shard in shards) > MOST_SHARDS:
        return False
    matrices = [matrix for shard in shards for matrix in (shard.down, shard.up) if matrix is not None]
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if not quantized:
        return True
    if all(shard.up is None for shard in shards):  # vLLM's GEMM alone
        return False
    weights = quantized[0].values.dtype
    same = all(m.num_bits == 8 and m.scale.shape[1] == 1 and m.values.dtype == weights for m in quantized)
    return same and len(quantized) == len(matrices) and wants_triton() and _suits(dtype, weights, matrices[0].device)


@cache
def _table(device: str, chosen: str | None) -> Table | None:
    """The measured tiles for a GPU of this name, from a chosen file or the user's cache.

    Raises:
        InputError: the chosen file cannot be used.
    """
    path = Path(chosen) if chosen else default_path(device)
    if not chosen and not os.path.exists(path):  # unlike Path.exists, also false for an unreadable folder
        return None
    try:
        table = read_table(path)
    except ValueError as error:
        if chosen:
            raise InputError(f"{TABLE_VARIABLE}: {error}") from None
        logger.warning("%s; using the default tiles", error)
        return None
    if table.device != device:
        logger.warning("%s is for another GPU, %s", path, table.device)
    logger.info("Tiles of %d layers from %s", len(table.layers), path)
    return table


def _rows(gemm: Gemm, height: int, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a GEMM that belong to the first rows of its matrix."""
    y = gemm(x, None)
    return y if y.shape[1] == height else y[:, :height]


class ScratchPool:
    """The split-K scratch of a device, one for each stream: on a stream, layers run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of: dict[int, SplitKScratch] = {}
        self.room = (0, 0)

    def reserve(self, rows: int, steps: Steps) -> None:
        """Make room for a layer on all streams, later ones included."""
        numbers, tiles = room(rows, steps)
        self.room = max(self.room[0], numbers), max(self.room[1], tiles)
        for scratch in self.of.values():
            scratch.grow(*self.room)

    def here(self) -> SplitKScratch | None:
        """The current stream's."""
        if self.device.type != "cuda":
            return self.of_stream(0, capturing=False)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        # The capture state is read only if it matters.
        return self.of.get(stream) or self.of_stream(stream, torch.cuda.is_current_stream_capturing())

    def of_stream(self, stream: int, capturing: bool) -> SplitKScratch | None:
        """The scratch of a stream, made on first use.

        It is not made while a graph is captured: only that graph would clear the counters. vLLM runs a model on the
        stream before it captures there.
        """
        if stream not in self.of and capturing:
            logger.warning("A stream is captured on which no layer has run before: using library GEMMs")
            return None
        if stream not in self.of:
            self.of[stream] = SplitKScratch(self.device)
            self.of[stream].grow(*self.room)
        return self.of[stream]


_scratch_pools: dict[torch.device, ScratchPool] = {}


class TritonGemms:
    """The GEMMs of a layer on a GPU.

    Args:
        shards: in the order of the layer's outputs, of which `can_take` is true.
        has_bias: whether the layer may be called with a bias.
        activation: SiLU of the first shard times the second, from [tokens, out], if the layer computes it as well;
            only with the cut REPLICATED.
        cut, tp_size, dtype: as of FactoredGemms.

    Attributes:
        in_place: whether the GEMMs for many tokens read the same memory as the kernels. Otherwise, with weights of 8
            bits, vLLM has no such kernel here, and the layer would take twice its memory.

    Raises:
        ValueError: the kernels do not support the shards.
        InputError: an environment variable of this module is wrong.
    """

    def __init__(
        self,
        shards: Sequence[Shard[Matrix]],
        has_bias: bool,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cut: Cut = Cut.REPLICATED,
        tp_size: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        blocks = tp_size if cut is Cut.ALL_GATHER_Z else 1
        self.layer = PackedLayer(shards, blocks, cut is not Cut.REPLICATED, dtype)
        found = [quantized_gemm(matrix, self.layer.dtype) for matrix in self.layer.quantized()]
        self.scaled: list[Gemm] = [gemm for gemm in found if gemm is not None]
        self.in_place = len(self.scaled) == len(found) and all(map(self._reads_mine, self.scaled))
        self.library: Gemms | None = None  # cuBLAS
        if self.scaled and self.in_place:
            heights = [len(self.layer.v), *self.layer.heights]
            self.library = [partial(_rows, *pair) for pair in zip(self.scaled, heights, strict=True)]
        self.collective = collective_of(cut, self.layer.widths, tp_size)
        self.activation = activation
        self.gate = Gate(self.layer, shards) if activation else None
        device = shards[0].down.device
        if device not in _scratch_pools:
            _scratch_pools[device] = ScratchPool(device)
        self.scratch_pool = _scratch_pools[device]
        self.overlap = can_overlap(device)
        self.amd = bool(torch.version.hip)
        self.steps: Steps = ()
        if not self.in_place or not wants_triton() or not _suits(self.layer.dtype, self.layer.weight_dtype, device):
            return
        measured = self._measured(device)
        if measured:
            try:
                self._compile(measured, has_bias)
                return
            except torch.OutOfMemoryError:
                raise
            except REFUSALS as error:
                # The table is from another Triton, or for another GPU.
                logger.warning("%s: tiles of the table cannot be compiled (%s)", self.layer.sizes, error)
        self._compile(default_steps(self.layer.sizes, self.gate is not None, self.amd), has_bias)

    def _measured(self, device: torch.device) -> Steps | None:
        """The steps for this layer in the table of measured tiles."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        table = _table(name, os.environ.get(TABLE_VARIABLE))
        steps = table.steps(self.layer.sizes) if table else None
        if steps is None or self.gate is None:
            return steps
        # Measured without the activation, which takes twice the registers and saves a launch: only the down tiles hold.
        usual = default_steps(self.layer.sizes, True, self.amd)
        found = []
        for most in sorted({step.most_tokens for step in (*steps, *usual)}):
            own, measured = tiles_for(usual, most), tiles_for(steps, most)
            if own:
                found.append(Step(most, ((measured[0] if measured else None) or own[0], own[1])))
        return tuple(found)

    def _compile(self, steps: Steps, has_bias: bool) -> None:
        """Make room for the steps, and run every kernel once: a first run under a request would compile there."""
        self.scratch_pool.reserve(len(self.layer.v), steps)
        self.steps = steps
        # After the last step cuBLAS computes the layer, with our permute kernel for scattered outputs.
        first = [1, *(step.most_tokens + 1 for step in steps)]
        for tokens, tiles in zip(first, (*(step.tiles for step in steps), None), strict=True):
            if tiles or self.layer.sources is not None:
                x = self.layer.v.new_zeros(tokens, self.layer.columns, dtype=self.layer.dtype)
                stand_in = self._no_collective if self.collective else None
                self._run(x, None, stand_in)
                if has_bias:
                    self._run(x, x.new_zeros(self.layer.out), stand_in)

    def refill(self, other: "TritonGemms") -> None:
        """Copy another layer's weights into this one's storage, which captured graphs read.

        Raises:
            ValueError: it has other sizes; nothing is copied.
        """
        mine, theirs = self._tensors(), other._tensors()
        same = all(getattr(self.layer, name) == getattr(other.layer, name) for name in ("heights", "ranks", "v_starts"))
        if not same or [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
            raise ValueError(OTHER_SIZES)
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
        for old_gemm, new_gemm in zip(self.scaled, other.scaled, strict=True):
            for old, new in zip(old_gemm.weights, new_gemm.weights, strict=True):
                if old.dtype != self.layer.weight_dtype:  # scales of their own
                    old.copy_(new)
        # Sleep of level 2 discards everything that was allocated at load.
        for scratch in self.scratch_pool.of.values():
            scratch.counters.zero_()

    def _reads_mine(self, gemm: Gemm) -> bool:
        """Whether a GEMM of quantized weights reads those of the kernels, and no copy of them."""
        mine = {tensor.untyped_storage().data_ptr() for tensor in (self.layer.v, self.layer.u)}
        held = [weight for weight in gemm.weights if weight.dtype == self.layer.weight_dtype]
        return bool(held) and mine >= {weight.untyped_storage().data_ptr() for weight in held}

    def _tensors(self) -> list[torch.Tensor]:
        places = [self.gate.places] if self.gate and self.gate.places is not None else []
        return [*self.layer.tensors(), *places]

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], or half of it after the activation."""
        return self._run(x, bias, self.collective)

    def _no_collective(self, z: torch.Tensor) -> torch.Tensor:
        """z of the right shape without a collective: ranks may compile a different number of kernels."""
        return z.new_zeros(len(z), sum(self.layer.ranks))

    def _run(self, x: torch.Tensor, bias: torch.Tensor | None, collective: Collective | None) -> torch.Tensor:
        tiles = tiles_for(self.steps, len(x))
        scratch = self.scratch_pool.here() if tiles else None
        if tiles is None or scratch is None:
            kernels = bool(self.steps)
            if self.gate and kernels and self.layer.sources is not None:
                return run_library_gated(x, self.layer, self.gate, bias, self.library)
            y = run_library(x, self.layer, bias, collective, kernels, self.library)
            return self.activation(y) if self.activation else y
        if self.gate:
            return run_gated(x, self.layer, self.gate, scratch, bias, tiles, self.overlap)
        return run(x, self.layer, scratch, bias, tiles, self.overlap, collective)
