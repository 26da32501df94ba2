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
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from pgsvd_vllm.checkpoint import FactoredModule
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.linear import PgsvdLinearMethod, Shard, find_layer, make_findable
from pgsvd_vllm.multiplied_back import multiplied
from pgsvd_vllm.sharding import Traffic

# What vLLM calls the gate, up and down projections of an expert, and their places in a merged layer.
GATE, UP, DOWN = "w1", "w3", "w2"
PLACE = {GATE: 0, UP: 1, DOWN: 0}
ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}

# An expert's shards by vLLM's name.
Expert = dict[str, Shard]


def experts_method(
    layer: RoutedExperts, prefix: str, name: str, modules: Mapping[str, FactoredModule], traffic: Traffic
) -> "FactoredExpertsMethod | MultipliedBackMethod | None":
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
        experts.append({kind: Shard(one, modules.get(one)) for kind, one in names.items()})
    if all(shard.module is None for expert in experts for shard in expert.values()):
        return None
    config = layer.moe_config
    suits = (
        current_platform.is_cpu()
        and layer.activation in ACTIVATIONS
        and not (config.moe_parallel_config.use_ep or config.has_bias or config.is_lora_enabled)
        and not layer.apply_router_weight_on_input
    )
    return FactoredExpertsMethod(config, prefix, experts, traffic) if suits else MultipliedBackMethod(config, experts)


def _kinds(experts: list[Expert], down: bool) -> list[str]:
    """The names of the tensors that gate and up projections have, or down projections."""
    shards = [shard for expert in experts for name, shard in expert.items() if (name == DOWN) is down]
    return list(dict.fromkeys(kind for shard in shards for kind in shard.kinds))


def _stem(shard_id: str) -> str:
    """How vLLM's parameters of a projection begin."""
    return "w2" if shard_id == DOWN else "w13"


def _register(
    layer: Any, experts: list[Expert], take: Callable[[int, str, str, torch.Tensor], bool], known: tuple[str, ...] = ()
) -> None:
    """Empty parameters of the names that vLLM looks for when it comes to an expert's tensors.

    Args:
        layer: vLLM's.
        experts: their shards.
        take: gets an expert's number, vLLM's name of the projection, the kind of a tensor and the tensor; says whether
            it belongs to this rank.
        known: kinds that have parameters already.
    """

    def load(
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        kind = weight_name.rpartition(".")[2].removeprefix(f"{_stem(shard_id)}_")
        return take(expert_id, shard_id, kind, loaded_weight)

    for shard_id in (GATE, DOWN):
        for kind in _kinds(experts, shard_id == DOWN):
            if kind in known:
                continue
            parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = load
            layer.register_parameter(f"{_stem(shard_id)}_{kind}", parameter)


class _Part(nn.Module):
    """A linear layer as `PgsvdLinearMethod` knows them: gate and up of an expert, or its down projection."""

    bias = None
    reduce_results = False

    def __init__(self, prefix: str, config: FusedMoEConfig, shards: list[Shard], traffic: Traffic) -> None:
        super().__init__()
        self.prefix, self.tp_rank, self.tp_size = prefix, config.tp_rank, config.tp_size
        self.quant_method = PgsvdLinearMethod(shards, traffic)

    def load(self, kind: str, tensor: torch.Tensor, place: int) -> None:
        parameter: Any = getattr(self, kind, None)
        if parameter is None:
            shard = self.quant_method.shards[place]
            raise CheckpointError(f"tensor {shard.name}.{kind}: config.json says {shard.name} has none such")
        parameter.weight_loader(parameter, tensor, place)


class FactoredExpertsMethod(FusedMoEMethodBase):
    """Experts as pairs of linear layers of low rank, one after the other over those that tokens have chosen.

    Args:
        moe: of the layer.
        prefix: its name.
        experts: their shards.
        traffic: of the model's layers before this one.
    """

    def __init__(self, moe: FusedMoEConfig, prefix: str, experts: list[Expert], traffic: Traffic) -> None:
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


class MultipliedBackMethod(UnquantizedFusedMoEMethod):
    """vLLM's own experts, from factors that are multiplied back as they come.

    Args:
        moe: of the layer.
        experts: their shards.
    """

    def __init__(self, moe: FusedMoEConfig, experts: list[Expert]) -> None:
        super().__init__(moe)
        self.experts = experts
        self.packed = False

    @property
    def supports_eplb(self) -> bool:
        """Experts that move between ranks would have to be multiplied back there."""
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """vLLM's dense parameters, and what it finds the factors by."""
        super().create_weights(layer, *args, **kwargs)
        self.waiting: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self.done: set[tuple[int, str]] = set()
        self.loads = layer.weight_loader
        self.dense = {False: layer.w13_weight, True: layer.w2_weight}
        self.local = layer._map_global_expert_id_to_local_expert_id
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        _register(layer, self.experts, self._take, ("weight",))

    def _take(self, expert_id: int, shard_id: str, kind: str, tensor: torch.Tensor) -> bool:
        """One factor of an expert; see `_register`."""
        if self.packed:
            raise _loaded(self.experts)
        shard = self.experts[expert_id][shard_id]
        if shard.module is None or kind not in shard.kinds:
            raise CheckpointError(f"tensor {shard.name}.{kind}: config.json says {shard.name} has none such")
        if self.local(expert_id) == -1:
            return False
        parts = self.waiting.setdefault((expert_id, shard_id), {})
        dense = self.dense[shard_id == DOWN]
        # Not a view of the file, and multiplied where it is served.
        parts[kind] = tensor.to(dense.device, copy=True)
        if len(parts) < len(shard.kinds):
            return True
        del self.waiting[expert_id, shard_id]
        self.done.add((expert_id, shard_id))
        weight = multiplied(shard.name, shard.module, parts).to(dense.dtype)
        return self.loads(dense, weight, f"{_stem(shard_id)}_weight", shard_id, expert_id, return_success=True)

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's own; raises CheckpointError where a factor has not come."""
        for number, expert in enumerate(self.experts):
            for shard_id, shard in expert.items():
                here = self.local(number) != -1 and not self.is_dummy
                if here and shard.module is not None and (number, shard_id) not in self.done:
                    raise CheckpointError(f"{shard.name}: not all of its factors are in the checkpoint")
        super().process_weights_after_loading(layer)
        # What was packed is not needed any more.
        self.dense.clear()
        self.packed = True


def _loaded(experts: list[Expert]) -> CheckpointError:
    return CheckpointError(f"{experts[0][GATE].name}: factored experts are loaded once; restart the server")


def _experts(x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerNameType) -> torch.Tensor:
    return find_layer(_resolve_layer_name(layer_name)).run(x, weights, numbers)


def _experts_fake(
    x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("pgsvd", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_library)
