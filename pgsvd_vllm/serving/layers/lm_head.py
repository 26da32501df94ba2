"""vLLM's method for a factored output head: every rank has V, and its own words' rows of U."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms


class PgsvdLMHeadMethod(QuantizeMethodBase):
    """Computes logits from two factors.

    Args:
        name: of the head in the checkpoint, for messages.
        module: its rank and form.

    Raises:
        CheckpointError: a form other than plain factors.
    """

    def __init__(self, name: str, module: FactoredModule) -> None:
        if module.form != "factors":
            raise CheckpointError(f"{name}: the form {module.form} is not for output heads, only factors is")
        self.module = module

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register both factors, with vLLM's loader, which cuts what has an `output_dim` and pads it."""
        rank = self.module.rank
        for name, shape in (("weight_v", (rank, input_size)), ("weight_u", (sum(output_partition_sizes), rank))):
            parameter: Any = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = extra_weight_attrs["weight_loader"]
            if name == "weight_u":
                parameter.output_dim = 0
            layer.register_parameter(name, parameter)

    def take_over(self, layer: Any) -> None:
        """Be the method of a head that was made with another one."""
        device, dtype = layer.weight.device, layer.weight.dtype
        del layer.weight
        layer.quant_method = self
        with device:
            self.create_weights(
                layer,
                layer.embedding_dim,
                [layer.num_embeddings_per_partition],
                layer.embedding_dim,
                layer.num_embeddings_padded,
                dtype,
                weight_loader=layer.weight_loader,
            )
            record_metadata_for_reloading(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the products; the originals are released."""
        layer.pgsvd_gemms = FactoredGemms([layer.weight_v.data], [layer.weight_u.data], [None])
        # LoRA asks it for its dtype and device.
        layer.weight = layer.weight_v.data.new_empty(0)
        for parameter in (layer.weight_v, layer.weight_u):
            parameter.data = parameter.data.new_empty(0)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> logits [tokens, words of this rank]."""
        return layer.pgsvd_gemms(x, bias)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Never: raises CheckpointError."""
        raise CheckpointError("a factored output head cannot be tied to the embeddings: config.json says both")
