"""Every private name, patched attribute and copied protocol of vLLM, each with its reason."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as vllm_ops
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import RowParallelLinear, split_tensor_along_last_dim
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

# Layers by name for code that runs without vLLM's forward context, such as vision encoders.
_layers_without_context: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
# vLLM's dispatch compiles a kernel for every shape and number of tokens, half a millisecond each. That is
# little for a dense model, whose layers share their shapes, and much for one whose ranks all differ. vLLM's
# packed kernel compiles next to nothing and is the faster for few tokens; with many inputs it is the slower
# for many tokens: 1.03 times the other's time at 2048 inputs and 512 tokens, 1.24 at 4096, 2.9 at 11008.
PACKED_INPUTS = 2048
# It takes inputs and outputs by these multiples.
PACKED_IN, PACKED_OUT = 32, 16
Run = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class InnerReduceRowParallelLinear(RowParallelLinear):
    """A row-parallel layer whose method hands out the whole sum, bias and all.

    A layer becomes one by its class alone. `reduce_results` stays true, as it is: models read it, and some clear it.
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, nn.Parameter | None]:
        """[..., in of this rank, or all] -> [..., out]."""
        x = input_
        if not self.input_is_parallel:
            x = split_tensor_along_last_dim(input_, num_partitions=self.tp_size)[self.tp_rank].contiguous()
        y = self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)
        if not self.reduce_results and self.tp_rank:
            # Cleared after the layer was made: the model sums what the ranks hand out.
            y = torch.zeros_like(y)
        if not self.return_bias:
            return y
        return y, self.bias if self.skip_bias_add else None


def _model_type(config: VllmConfig) -> str:
    return "" if config.model_config is None else config.model_config.hf_text_config.model_type


def make_findable(layer: Any, config: VllmConfig) -> None:
    """Let the op find a layer by its name."""
    config.compilation_config.static_forward_context[layer.prefix] = layer
    _layers_without_context[layer.prefix] = layer


def find_layer(name: str) -> Any:
    """What `make_findable` was told of; in a running model its own, whatever else the process holds."""
    if is_forward_context_available():
        layer = get_forward_context().no_compile_layers.get(name)
        if layer is not None:
            return layer
    return _layers_without_context[name]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and dtype have the packed kernel."""
    return (
        current_platform.is_cpu()
        and dtype == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops._C, "convert_weight_packed")
    )


def packed_gemm(weight: torch.Tensor) -> Run:
    """x @ weight.T (+ bias) by vLLM's packed CPU kernel; bf16, x has rows at any distance.

    Args:
        weight: [out, in], `in` a multiple of PACKED_IN; not kept.
    """
    out = len(weight)
    missing = -out % PACKED_OUT
    packed = torch.ops._C.convert_weight_packed(F.pad(weight, (0, 0, 0, missing)))

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = None if bias is None else F.pad(bias.float(), (0, missing))
        return vllm_ops.weight_packed_linear_cpu(x, packed, out + missing, wide)[:, :out]

    return run


def vllm_gemm(weight: torch.Tensor) -> Run:
    """x @ weight.T (+ bias) as vLLM's dense layers compute it.

    Args:
        weight: [out, in]; not kept where it is packed.
    """
    if not current_platform.is_cpu():
        return lambda x, bias: F.linear(x, weight, bias)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    # The dispatch turns the `bias` of a layer into float32 where the kernel it picks wants that.
    # The bias belongs to the whole layer, not to this product: an empty one shows the dtype.
    layer.bias = nn.Parameter(weight.new_empty(0), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    kept, bias_dtype, linear = layer.weight.data, layer.bias.dtype, layer.cpu_linear
    # Of fewer outputs its kernel on AMX machines reads x as if its rows had no gaps.
    narrow = len(weight) < PACKED_OUT

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x.contiguous() if narrow else x, kept, None if bias is None else bias.to(bias_dtype))

    return run
