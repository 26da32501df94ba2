"""vLLM's methods for MoE layers with factored experts.

On CPU every expert is computed from its factors, by the same GEMMs as linear layers. On GPUs one kernel runs all
experts and needs equal sizes: there the dense weights are reconstructed at load.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    MoEActivation,
    RoutedExperts,
)
from vllm.platforms import current_platform

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.parallel.comm_plan import CommPlan
from pgsvd_vllm.serving.layers.layer_shard import LayerShard
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.layers.moe_dense import DenseFallbackMoEMethod, Expert, loaded_twice, register_factors
from pgsvd_vllm.serving.vllm_compat.internals import (
    DOWN,
    GATE,
    UP,
    LayerName,
    encode,
    expert_names,
    find_layer,
    make_findable,
    register_op,
)

PLACE = {GATE: 0, UP: 1, DOWN: 0}
ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


def moe_method(
    layer: RoutedExperts, prefix: str, name: str, modules: Mapping[str, FactoredModule], comm_plan: CommPlan
) -> "FactoredMoEMethod | DenseFallbackMoEMethod | None":
    """The method of a MoE layer; None if none of its experts is factored.

    Args:
        layer: being made.
        prefix: its name in vLLM.
        name: the same in the checkpoint.
        modules: the checkpoint's table.
        comm_plan: of the model.
    """
    leaves = expert_names(layer)
    experts: list[Expert] = []
    for number in range(layer.moe_config.num_logical_experts):
        names = {kind: f"{name}.{number}.{leaf}" for kind, leaf in leaves.items()}
        experts.append({kind: LayerShard(one, modules.get(one)) for kind, one in names.items()})
    if all(shard.module is None for expert in experts for shard in expert.values()):
        return None
    config = layer.moe_config
    suits = (
        current_platform.is_cpu()
        and layer.activation in ACTIVATIONS
        and not (config.moe_parallel_config.use_ep or config.has_bias or config.is_lora_enabled)
        and not layer.apply_router_weight_on_input
    )
    return FactoredMoEMethod(config, prefix, experts, comm_plan) if suits else DenseFallbackMoEMethod(config, experts)


class _Part(nn.Module):
    """A linear layer for `PgsvdLinearMethod`: gate and up of an expert, or its down projection."""

    bias = None
    reduce_results = False

    def __init__(self, prefix: str, config: FusedMoEConfig, shards: list[LayerShard], comm_plan: CommPlan) -> None:
        super().__init__()
        self.prefix, self.tp_rank, self.tp_size = prefix, config.tp_rank, config.tp_size
        self.quant_method = PgsvdLinearMethod(shards, comm_plan)

    def load(self, kind: str, tensor: torch.Tensor, place: int) -> None:
        parameter: Any = getattr(self, kind, None)
        if parameter is None:
            shard = self.quant_method.shards[place]
            raise CheckpointError(f"tensor {shard.name}.{kind}: config.json lists no such tensor for {shard.name}")
        parameter.weight_loader(parameter, tensor, place)


class FactoredMoEMethod(FusedMoEMethodBase):
    """Experts as pairs of low-rank linear layers, computed one after the other for the tokens that chose them.

    Args:
        moe: of the layer.
        prefix: its name.
        experts: their shards.
        comm_plan: of the model.
    """

    def __init__(self, moe: FusedMoEConfig, prefix: str, experts: list[Expert], comm_plan: CommPlan) -> None:
        super().__init__(moe)
        # vLLM's MoE layer has the prefix itself.
        self.prefix = f"{prefix}.factored"
        self.experts, self.comm_plan = experts, comm_plan
        self.parts: list[tuple[_Part, _Part]] = []
        self.packed = False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_extra: object,
    ) -> None:
        """Make the experts' layers, and the parameters under which vLLM loads them."""
        here = intermediate_size_per_partition
        whole = here * self.moe.tp_size
        self.activation = ACTIVATIONS[layer.activation]
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        make_findable(self, config)
        for number, expert in enumerate(self.experts):
            name = f"{self.prefix}.experts.{number}"
            inner = _Part(f"{name}.gate_up", self.moe, [expert[GATE], expert[UP]], self.comm_plan)
            outer = _Part(f"{name}.down", self.moe, [expert[DOWN]], self.comm_plan)
            inner.quant_method.create_weights(inner, hidden_size, [here, here], hidden_size, 2 * whole, params_dtype)
            outer.quant_method.create_weights(outer, here, [hidden_size], whole, hidden_size, params_dtype)
            self.parts.append((inner, outer))
        register_factors(layer, self.experts, self._take)

    @property
    def layers(self) -> list[PgsvdLinearMethod]:
        """The methods of all experts' layers."""
        return [part.quant_method for pair in self.parts for part in pair]

    def _take(self, expert_id: int, shard_id: str, kind: str, tensor: torch.Tensor) -> bool:
        """Load one tensor of an expert; see `register_factors`."""
        if self.packed:
            raise loaded_twice(self.experts)
        part = self.parts[expert_id][shard_id == DOWN]
        part.load(kind, tensor, PLACE[shard_id])
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weights; raises CheckpointError if a tensor is missing."""
        for part in (part for pair in self.parts for part in pair):
            if self.is_dummy:
                for parameter in part.parameters():
                    if parameter.is_floating_point():
                        parameter.data.uniform_(-1e-3, 1e-3)
            part.quant_method.process_weights_after_loading(part)
        self.packed = True

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """No: the factors are not quantized."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden], weights and experts' numbers [tokens, chosen] -> [tokens, hidden]."""
        if not torch.compiler.is_compiling():
            return self.run(x, topk_weights, topk_ids)
        return torch.ops.pgsvd.experts(x, topk_weights, topk_ids, encode(self.prefix))

    def run(self, x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """As `apply`; the sum over experts is float32."""
        result = torch.zeros_like(x, dtype=torch.float32)
        chosen = numbers.flatten()
        order = chosen.argsort(stable=True)
        tokens, weight = order // numbers.shape[1], weights.flatten()[order, None].float()
        start = 0
        for (inner, outer), count in zip(self.parts, chosen.bincount(minlength=len(self.parts)).tolist(), strict=True):
            if not count:
                continue
            rows = tokens[start : start + count]
            gate, up = inner.pgsvd_gemms(x[rows]).chunk(2, dim=-1)  # type: ignore[operator]
            y = outer.pgsvd_gemms(self.activation(gate) * up)  # type: ignore[operator]
            result.index_add_(0, rows, y.float() * weight[start : start + count])
            start += count
        return result.to(x.dtype)


def _experts(x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerName) -> torch.Tensor:
    return find_layer(layer_name).run(x, weights, numbers)


def _experts_fake(x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerName) -> torch.Tensor:
    return torch.empty_like(x)


register_op("experts", _experts, _experts_fake)
