"""The matrix products of one loaded layer, whatever mix of ranks and forms its shards have.

All that reads the layer's input is one product: s = x [V_1; P_2; W_3; ...]^T, over the down factors of
the low-rank shards and the weights of the dense ones. Every low-rank shard has one more, of its part
of s. The outputs are then put together in one pass. On CPU the products are packed by vLLM's own dispatch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform


class Gemm:
    """x @ weight.T (+ bias), prepacked by vLLM's own dispatch on CPU.

    Args:
        weight: [out, in]; not kept where it is packed.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        layer: Any = nn.Module()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        # The dispatch turns the `bias` of a layer into float32 where the kernel it picks wants that
        # (AMX). The bias belongs to the whole layer, not to this product: an empty one shows the dtype.
        layer.bias = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self.run: Callable[..., torch.Tensor] = F.linear
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            self.run = layer.cpu_linear
        self.weight = layer.weight.data
        self.bias_dtype = layer.bias.dtype

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in], rows at any distance -> [tokens, out]."""
        return self.run(x, self.weight, None if bias is None else bias.to(self.bias_dtype))


class FactoredGemms:
    """The products of a layer, and how its outputs are put together from them.

    Args:
        first: the product of everything that reads x.
        ups: one product a low-rank shard, with the slice of the first product's output that it reads.
        pieces: the layer's outputs in order, each a product (0 is the first) and a slice of its output.
            Used where no shard has pivots.
        order: int64 [out], where the layer's outputs lie in the products' outputs, one product after
            the other; None where no shard has pivots.
    """

    def __init__(
        self,
        first: Gemm,
        ups: list[tuple[Gemm, slice]],
        pieces: list[tuple[int, slice]],
        order: torch.Tensor | None,
    ) -> None:
        self.first = first
        self.ups = ups
        self.pieces = pieces
        self.order = order

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        s = self.first(x)
        if len(self.pieces) == 1 and self.order is None:
            gemm, _ = self.ups[0]
            return gemm(s, bias)
        outputs = [s, *(gemm(s[:, columns]) for gemm, columns in self.ups)]
        if self.order is None:
            y = torch.cat([outputs[index][:, columns] for index, columns in self.pieces], dim=-1)
        else:
            # Not index_select: on CPU, along the last dimension, it takes five times as long.
            y = torch.cat(outputs, dim=-1).gather(1, self.order.expand(len(x), -1))
        return y if bias is None else y.add_(bias)
