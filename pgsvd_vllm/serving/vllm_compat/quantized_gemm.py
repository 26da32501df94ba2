"""GEMMs of quantized matrices by vLLM's kernels, which its dense quantized layers use."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as vllm_ops  # private: what this CPU can compute
from vllm.model_executor.kernels.linear import (  # internal: the choice of kernels for this machine
    choose_mp_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import (
    CPUWNA16LinearKernel,  # internal: its op may be missing
)
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    process_fp8_weight_channel_strategy,  # internal: AMD's other FP8, and the transpose
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # internal: the names of scale layouts
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    pack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype  # internal: kernels take the default dtype for outputs

from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix
from pgsvd_vllm.serving.vllm_compat.cpu_gemm import Gemm

logger = logging.getLogger("vllm.pgsvd")

# The CPU kernel of INT4 takes outputs by this multiple.
OUT_MULTIPLE = 32
# One of these instruction sets multiplies 8-bit integers exactly on x86.
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")


def quantized_gemm(matrix: QuantizedMatrix, dtype: torch.dtype) -> Gemm | None:
    """The GEMM of a quantized matrix; None where vLLM has no kernel for it on this machine.

    Args:
        matrix: [out, in]; not kept where the kernel packs it.
        dtype: of the activations.
    """
    if not len(matrix):
        return None
    make = _int4 if matrix.num_bits == 4 else _int8 if matrix.values.dtype == torch.int8 else _fp8
    with set_default_torch_dtype(dtype):
        try:
            layer, kernel = make(matrix, dtype)
        except ValueError as error:  # also of vLLM's choice of a kernel
            lines = str(error).strip().splitlines() or [type(error).__name__]
            _warn_once(f"{matrix.num_bits} bits, {matrix.values.dtype}", lines[-1])
            return None
        kernel.process_weights_after_loading(layer)
    out = len(matrix)

    def compute(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = kernel.apply_weights(layer, x.contiguous(), None)
        y = y if y.shape[1] == out else y[:, :out]
        return y if bias is None else y.add_(bias)

    held = [*layer.parameters(), *vars(layer).values(), *vars(kernel).values()]
    weights = [value.data for value in held if isinstance(value, torch.Tensor)]
    return Gemm(compute, weights, [value for value in held if hasattr(value, "handler_tensor")])


_warned: set[str] = set()


def _warn_once(kind: str, reason: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("No kernel for a quantized matrix (%s), it is dequantized: %s", kind, reason)


def _check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for activations that the kernels of GPUs do not take."""
    if dtype == torch.float32 and not current_platform.is_cpu():
        raise ValueError("vLLM's kernels take activations of 16 bits")


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _multiplies_int8() -> bool:
    """Whether this CPU's sums of INT8 products are exact."""
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or any(capabilities.get(name) for name in EXACT_INT8)


def _int8(matrix: QuantizedMatrix, dtype: torch.dtype) -> tuple[Any, Any]:
    """A stand-in for a layer with INT8 weights and dynamic INT8 activations, and its kernel."""
    _check_dtype(dtype)
    if current_platform.is_cuda() and current_platform.has_device_capability(100):
        raise ValueError("GPUs of compute capability 10 have no INT8 GEMM in vLLM")
    if current_platform.is_cpu() and not _multiplies_int8():
        raise ValueError("this CPU has no VNNI instructions, without which oneDNN's 16-bit sums of INT8 saturate")
    layer: Any = nn.Module()
    layer.weight, layer.weight_scale = _constant(matrix.values), _constant(matrix.scale.float())
    layer.input_scale = layer.input_zero_point = layer.azp_adj = layer.bias = None
    layer.logical_widths = [len(matrix)]
    return layer, init_int8_linear_kernel(True, False, True, "factors")


def _fp8(matrix: QuantizedMatrix, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same with FP8."""
    _check_dtype(dtype)
    if current_platform.is_cpu() and not vllm_ops.cpu_has_amx_fp8():
        raise ValueError("this CPU has no FP8 instructions")
    layer: Any = nn.Module()
    # vLLM's layers hold FP8 weights as [in, out].
    weight, scale, _ = process_fp8_weight_channel_strategy(matrix.values, matrix.scale.float())
    layer.weight, layer.weight_scale = _constant(weight), _constant(scale)
    layer.input_scale = layer.input_scale_ub = layer.bias = None
    layer.logical_widths = [len(matrix)]
    # Read by the weight-only kernel of GPUs without FP8 instructions.
    layer.output_size_per_partition, layer.input_size_per_partition = matrix.shape
    layer.orig_dtype = dtype
    kernel = init_fp8_linear_kernel(
        activation_quant_key=kFp8DynamicTokenSym,
        weight_quant_key=kFp8StaticChannelSym,
        input_dtype=dtype,
        out_dtype=dtype,
        weight_shape=(matrix.shape[0], matrix.shape[1]),
    )
    return layer, kernel


def _int4(matrix: QuantizedMatrix, dtype: torch.dtype) -> tuple[Any, Any]:
    """A stand-in for a layer with INT4 weights, and its kernel."""
    if dtype == torch.float32:
        raise ValueError("vLLM's kernels take activations of 16 bits")
    missing = -len(matrix) % OUT_MULTIPLE
    values, scale = F.pad(matrix.values, (0, 0, 0, missing)), F.pad(matrix.scale, (0, 0, 0, missing), value=1.0)
    out, width = values.shape
    size = width // scale.shape[1]
    config = MPLinearLayerConfig(
        full_weight_shape=(width, out),
        partition_weight_shape=(width, out),
        weight_type=scalar_types.uint4b8,
        act_type=dtype,
        group_size=size,
        zero_points=False,
    )
    chosen = choose_mp_linear_kernel(config)
    if chosen is CPUWNA16LinearKernel and not hasattr(torch.ops._C, "cpu_gemm_wna16"):  # private: compiled kernels
        raise ValueError("vLLM's kernels for this CPU have no INT4 GEMM; on x86 it wants AVX-512")
    kernel = chosen(config, "weight_packed", "weight_scale", "weight_zero_point")
    layer: Any = nn.Module()
    packed = pack_quantized_values_into_int32(values.int() + 8, scalar_types.uint4b8, 1)

    def unused(*_arguments: Any) -> None:
        """The weights are there already."""

    loader: Callable[..., None] = unused
    layer.weight_packed = PackedvLLMParameter(
        input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, data=packed, weight_loader=loader
    )
    layer.weight_scale = GroupQuantScaleParameter(input_dim=1, output_dim=0, data=scale.to(dtype), weight_loader=loader)
    layer.bias = None
    return layer, kernel
