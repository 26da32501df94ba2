"""Dense layers of a factored model, where vLLM compiles layer by layer."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.utils.torch_utils import _encode_layer_name

from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.vllm_compat import make_findable


class DenseBesideFactored(LinearMethodBase):
    """A dense layer's own method, called through the factored layers' op: layers of both kinds then share graphs.

    Args:
        method: the layer's own; its weights are there already.
    """

    cut = Cut.REPLICATED

    def __init__(self, method: UnquantizedLinearMethod) -> None:
        self.method = method

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """The layer's own."""
        self.method.create_weights(layer, *sizes, **more)

    def process_weights_after_loading(self, layer: Any) -> None:
        """The layer's own; then the op finds its product."""
        self.method.process_weights_after_loading(layer)
        layer.pgsvd_gemms = partial(self.method.apply, layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of this rank."""
        return torch.ops.pgsvd.linear(x, bias, layer.output_size_here, _encode_layer_name(layer.prefix))


def share_graphs(model: nn.Module, config: VllmConfig) -> None:
    """Hide dense layers that are factored elsewhere in the model, such as one of all down projections.

    Args:
        model: with parameters, before they are loaded.
        config: where the op finds layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    methods = [layer.quant_method for layer in layers]
    leaves = {
        layer.prefix.rpartition(".")[2]
        for layer, method in zip(layers, methods, strict=True)
        if isinstance(method, PgsvdLinearMethod) and method.opaque
    }
    for layer, method in zip(layers, methods, strict=True):
        known = config.compilation_config.static_forward_context
        if layer.prefix in known or type(method) is not UnquantizedLinearMethod:
            continue
        if layer.prefix.rpartition(".")[2] in leaves:
            made: Any = layer
            made.quant_method = DenseBesideFactored(method)
            made.output_size_here = made.weight.shape[0]
            make_findable(layer, config)
