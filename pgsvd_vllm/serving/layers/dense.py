"""Dense layers of a factored model, where vLLM compiles layer by layer."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod, apply_linear
from pgsvd_vllm.serving.vllm_compat.internals import is_findable, make_findable, mark_compiled_graphs


class DenseBesideFactored(LinearMethodBase):
    """A dense layer's own method behind the factored layers' op: layers of both kinds then share compiled graphs.

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
        """The layer's own; then the op can call its GEMM."""
        self.method.process_weights_after_loading(layer)
        layer.pgsvd_gemms = partial(self.method.apply, layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of this rank."""
        return apply_linear(layer, x, bias, layer.output_size_here, opaque=True)


def share_graphs(model: nn.Module, config: VllmConfig) -> int:
    """Make dense layers opaque whose name is factored elsewhere in the model, such as one of all down projections.

    The traced code is not vLLM's own then: `config` gets a mark that tells cached graphs apart.

    Args:
        model: with parameters, before they are loaded.
        config: of the engine, whose compiled graphs find the layers there.

    Returns:
        the number of such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    leaves = {
        layer.prefix.rpartition(".")[2]
        for layer in layers
        if isinstance(layer.quant_method, PgsvdLinearMethod) and layer.quant_method.opaque
    }
    dense = [
        layer
        for layer in layers
        if type(layer.quant_method) is UnquantizedLinearMethod
        and layer.prefix.rpartition(".")[2] in leaves
        and not is_findable(layer, config)
    ]
    if not dense or not mark_compiled_graphs(config, opaque_dense_layers=len(dense)):
        return 0
    for layer in dense:
        made: Any = layer
        made.quant_method = DenseBesideFactored(made.quant_method)
        made.output_size_here = made.weight.shape[0]
        make_findable(layer, config)
    return len(dense)
