"""vLLM's methods for the experts of mixtures where some are factored.

On CPU every expert is computed from its factors, by the same products as linear layers. Elsewhere, where one kernel
runs all experts and wants them equal, the factors are multiplied back while they are loaded.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.parallel.comm_plan import CommPlan
from pgsvd_vllm.serving.layers.linear import LayerShard, PgsvdLinearMethod
from pgsvd_vllm.serving.layers.moe_dense import DOWN, GATE, UP, DenseFallbackMoEMethod, Expert, _loaded, _register
from pgsvd_vllm.serving.vllm_compat import find_layer, make_findable

PLACE = {GATE: 0, UP: 1, DOWN: 0}
ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


def moe_method(
    layer: RoutedExperts, prefix: str, name: str, modules: Mapping[str, FactoredModule], traffic: CommPlan
) -> "FactoredMoEMethod | DenseFallbackMoEMethod | None":
    """The method of a mixture, or None where none of its experts is factored.

    Args:
        layer: being made.
        prefix: its name in vLLM.
        name: the same in the checkpoint.
        modules: the checkpoint's table.
        traffic: of the model's layers before this one.
    """
    leaves = {GATE: layer.ckpt_gate_proj_name, UP: layer.ckpt_up_proj_name, DOWN: layer.ckpt_down_proj_name}
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
    return FactoredMoEMethod(config, prefix, experts, traffic) if suits else DenseFallbackMoEMethod(config, experts)


class _Part(nn.Module):
    """A linear layer as `PgsvdLinearMethod` knows them: gate and up of an expert, or its down projection."""

    bias = None
    reduce_results = False

    def __init__(self, prefix: str, config: FusedMoEConfig, shards: list[LayerShard], traffic: CommPlan) -> None:
        super().__init__()
        self.prefix, self.tp_rank, self.tp_size = prefix, config.tp_rank, config.tp_size
        self.quant_method = PgsvdLinearMethod(shards, traffic)

    def load(self, kind: str, tensor: torch.Tensor, place: int) -> None:
        parameter: Any = getattr(self, kind, None)
        if parameter is None:
            shard = self.quant_method.shards[place]
            raise CheckpointError(f"tensor {shard.name}.{kind}: config.json says {shard.name} has none such")
        parameter.weight_loader(parameter, tensor, place)


class FactoredMoEMethod(FusedMoEMethodBase):
    """Experts as pairs of linear layers of low rank, one after the other over those that tokens have chosen.

    Args:
        moe: of the layer.
        prefix: its name.
        experts: their shards.
        traffic: of the model's layers before this one.
    """

    def __init__(self, moe: FusedMoEConfig, prefix: str, experts: list[Expert], traffic: CommPlan) -> None:
        super().__init__(moe)
        # The name belongs to the mixture itself.
        self.prefix = f"{prefix}.factored"
        self.experts, self.traffic = experts, traffic
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
        """Make the experts' layers, and what vLLM finds them by."""
        here = intermediate_size_per_partition
        whole = here * self.moe.tp_size
        self.activation = ACTIVATIONS[layer.activation]
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        make_findable(self, config)
        for number, expert in enumerate(self.experts):
            name = f"{self.prefix}.experts.{number}"
            inner = _Part(f"{name}.gate_up", self.moe, [expert[GATE], expert[UP]], self.traffic)
            outer = _Part(f"{name}.down", self.moe, [expert[DOWN]], self.traffic)
            inner.quant_method.create_weights(inner, hidden_size, [here, here], hidden_size, 2 * whole, params_dtype)
            outer.quant_method.create_weights(outer, here, [hidden_size], whole, hidden_size, params_dtype)
            self.parts.append((inner, outer))
        _register(layer, self.experts, self._take)

    @property
    def layers(self) -> list[PgsvdLinearMethod]:
        """The methods of all experts' layers."""
        return [part.quant_method for pair in self.parts for part in pair]

    def _take(self, expert_id: int, shard_id: str, kind: str, tensor: torch.Tensor) -> bool:
        """One tensor of an expert; see `_register`."""
        if self.packed:
            raise _loaded(self.experts)
        part = self.parts[expert_id][shard_id == DOWN]
        part.load(kind, tensor, PLACE[shard_id])
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the products; raises CheckpointError where a tensor has not come."""
        for part in (part for pair in self.parts for part in pair):
            if self.is_dummy:
                for parameter in part.parameters():
                    if parameter.is_floating_point():
                        parameter.data.uniform_(-1e-3, 1e-3)
            part.quant_method.process_weights_after_loading(part)
        self.packed = True

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """None is quantized."""
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
        return torch.ops.pgsvd.experts(x, topk_weights, topk_ids, _encode_layer_name(self.prefix))

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


def _experts(x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerNameType) -> torch.Tensor:
    return find_layer(_resolve_layer_name(layer_name)).run(x, weights, numbers)


def _experts_fake(
    x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("pgsvd", "FRAGMENT")


direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_library)
