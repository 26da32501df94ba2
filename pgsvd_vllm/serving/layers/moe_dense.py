"""MoE experts whose dense weights are reconstructed at load."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import multiplied
from pgsvd_vllm.serving.layers.linear import LayerShard

# What vLLM calls the gate, up and down projections of an expert, and their places in a merged layer.
GATE, UP, DOWN = "w1", "w3", "w2"
# An expert's shards by vLLM's name.
Expert = dict[str, LayerShard]


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


class DenseFallbackMoEMethod(UnquantizedFusedMoEMethod):
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
