"""vLLM's method for a factored LM head: V is replicated, U is vocab-parallel."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms


class PgsvdLMHeadMethod(QuantizeMethodBase):
    """Computes logits from two factors.

    Args:
        name: of the LM head in the checkpoint, for messages.
        module: its rank and form.

    Raises:
        CheckpointError: a form other than plain factors.
    """

    def __init__(self, name: str, module: FactoredModule) -> None:
        if module.form != "factors":
            raise CheckpointError(f"{name}: an LM head must have the form factors, not {module.form}")
        self.name, self.module = name, module

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
        """Register both factors with vLLM's loader, which shards and pads a parameter that has an `output_dim`."""
        rank = self.module.rank
        for name, shape in (("weight_v", (rank, input_size)), ("weight_u", (sum(output_partition_sizes), rank))):
            parameter: Any = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = extra_weight_attrs["weight_loader"]
            if name == "weight_u":
                parameter.output_dim = 0
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weights, into the storage of the first ones in a reload, and release the originals.

        Raises:
            CheckpointError: a factor holds NaN or infinity.
        """
        for kind in self.module.suffixes:
            check_finite(getattr(layer, kind), f"{self.name}.{kind}")
        packed = FactoredGemms([Shard(layer.weight_v.data, layer.weight_u.data)])
        if hasattr(layer, "pgsvd_gemms"):
            layer.pgsvd_gemms.refill(packed)
        else:
            layer.pgsvd_gemms = packed
        # LoRA reads its dtype and device.
        layer.weight = layer.weight_v.data.new_empty(0)
        for parameter in (layer.weight_v, layer.weight_u):
            parameter.data = parameter.data.new_empty(0)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> logits [tokens, this rank's vocabulary]."""
        return layer.pgsvd_gemms(x, bias)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Never: raises CheckpointError."""
        raise CheckpointError("a factored LM head cannot be tied to the embeddings: config.json says both")
