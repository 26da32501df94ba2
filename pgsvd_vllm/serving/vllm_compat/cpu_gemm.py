"""vLLM's CPU GEMM kernels, called without a layer of vLLM's around them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as vllm_ops  # private: wrappers of the CPU kernels with fake implementations
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # internal: the kernel of dense CPU layers
from vllm.platforms import current_platform

# vLLM's dispatch compiles a kernel for every shape and number of tokens, half a millisecond each. That is
# little for a dense model, whose layers share their shapes, and much for one whose ranks all differ. vLLM's
# packed kernel compiles next to nothing and is the faster for few tokens; with many inputs it is the slower
# for many tokens: 1.03 times the other's time at 2048 inputs and 512 tokens, 1.24 at 4096, 2.9 at 11008.
PACKED_INPUTS = 2048
# The packed kernel takes inputs and outputs by these multiples.
PACKED_IN, PACKED_OUT = 32, 16
Compute = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class Gemm:
    """x [tokens, in], bias [out] or None -> x @ weight.T (+ bias) [tokens, out].

    Args:
        compute: the GEMM; holds its weights.
        weights: the tensors that `compute` reads, in a fixed order.
        handlers: vLLM's handles of weights that oneDNN has packed, whose memory torch cannot reach.
    """

    def __init__(self, compute: Compute, weights: Sequence[torch.Tensor], handlers: Sequence[Any] = ()) -> None:
        self.compute = compute
        self.weights, self.handlers = list(weights), list(handlers)
        self.borrowed: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See the class."""
        return self.compute(x, bias)

    def shapes(self) -> list[tuple[int, ...]]:
        """The sizes of its weights, which must be equal for `refill`."""
        return [*(tuple(one.shape) for one in self.weights), *((one.n, one.k) for one in self.handlers)]

    def refill(self, other: "Gemm") -> None:
        """Copy the weights of a GEMM of the same `shapes` into this one's storage; `other` is no longer usable."""
        for mine, theirs in zip(self.weights, other.weights, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.handlers, other.handlers, strict=True):
            # A handle is a pointer in a tensor, which compiled graphs read: the two handles swap their packed weights.
            pointer = mine.handler_tensor.clone()
            mine.handler_tensor.copy_(theirs.handler_tensor)
            theirs.handler_tensor.copy_(pointer)
        # oneDNN's handle of a quantized weight points to the scales that it was made with.
        self.borrowed = other.weights if self.handlers else []


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and dtype have the packed kernel."""
    return (
        current_platform.is_cpu()
        and dtype == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops._C, "convert_weight_packed")  # private: vLLM's compiled kernels
    )


def packed_gemm(weight: torch.Tensor) -> Gemm:
    """The GEMM by vLLM's packed CPU kernel; bf16, x has rows at any distance.

    Args:
        weight: [out, in], `in` a multiple of PACKED_IN; not kept.
    """
    out = len(weight)
    missing = -out % PACKED_OUT
    packed = torch.ops._C.convert_weight_packed(F.pad(weight, (0, 0, 0, missing)))

    def compute(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = None if bias is None else F.pad(bias.float(), (0, missing))
        return vllm_ops.weight_packed_linear_cpu(x, packed, out + missing, wide)[:, :out]

    return Gemm(compute, [packed])


def vllm_gemm(weight: torch.Tensor) -> Gemm:
    """The GEMM as vLLM's dense layers compute it.

    Args:
        weight: [out, in]; not kept where the kernel packs it.
    """
    if not current_platform.is_cpu():
        return Gemm(lambda x, bias: F.linear(x, weight, bias), [weight])
    # Copied protocol: the dispatch reads `weight` and `bias` of a layer and sets `cpu_linear`.
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    # The dispatch turns the `bias` of a layer into float32 where the kernel it picks wants that. The bias belongs to
    # the whole layer, not to this GEMM: an empty one shows the dtype.
    layer.bias = nn.Parameter(weight.new_empty(0), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    kept, bias_dtype, linear = layer.weight.data, layer.bias.dtype, layer.cpu_linear
    # With fewer outputs vLLM's kernel on AMX machines reads x as if its rows had no gaps.
    narrow = len(weight) < PACKED_OUT

    def compute(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x.contiguous() if narrow else x, kept, None if bias is None else bias.to(bias_dtype))

    # `cpu_linear` has its packed weights in a closure and nowhere else.
    captured = inspect.getclosurevars(linear).nonlocals.values() if inspect.isfunction(linear) else ()
    weights = [kept, *(value for value in captured if isinstance(value, torch.Tensor))]
    return Gemm(compute, weights, [value for value in captured if hasattr(value, "handler_tensor")])
