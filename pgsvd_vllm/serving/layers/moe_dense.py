"""MoE experts whose dense weights are reconstructed at load."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, UnquantizedFusedMoEMethod

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.serving.layers.layer_shard import LayerShard
from pgsvd_vllm.serving.vllm_compat.internals import (
    DOWN,
    GATE,
    expert_parameter,
    expert_weights,
    local_expert,
    register_expert_factor,
)

# An expert's shards by vLLM's name of the projection: GATE, UP, DOWN.
Expert = dict[str, LayerShard]


def _kinds(experts: list[Expert], down: bool) -> list[str]:
    """The suffixes of the tensors of gate and up projections, or of down projections."""
    shards = [shard for expert in experts for name, shard in expert.items() if (name == DOWN) is down]
    return list(dict.fromkeys(kind for shard in shards for kind in shard.kinds))


def register_factors(
    layer: Any, experts: list[Expert], take: Callable[[int, str, str, torch.Tensor], bool], known: tuple[str, ...] = ()
) -> None:
    """Register an empty parameter for each kind of tensor, with a loader that calls `take`.

    Args:
        layer: vLLM's.
        experts: their shards.
        take: as of `register_expert_factor`.
        known: kinds that have parameters already.
    """
    for shard_id in (GATE, DOWN):
        for kind in _kinds(experts, shard_id == DOWN):
            if kind not in known:
                register_expert_factor(layer, shard_id, kind, take)


class DenseFallbackMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's own experts, reconstructed from their factors as these are loaded.

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
        """No: load balancing moves experts between ranks, and only their first rank reconstructs them."""
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """vLLM's dense parameters, and one parameter for each kind of factor."""
        super().create_weights(layer, *args, **kwargs)
        self.waiting: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self.done: set[tuple[int, str]] = set()
        self.loads = layer.weight_loader
        self.dense = {False: expert_weights(layer, GATE), True: expert_weights(layer, DOWN)}
        self.local = partial(local_expert, layer)
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        register_factors(layer, self.experts, self._take, ("weight",))

    def _take(self, expert_id: int, shard_id: str, kind: str, tensor: torch.Tensor) -> bool:
        """Keep one factor of an expert; see `register_factors`."""
        if self.packed:
            raise loaded_twice(self.experts)
        shard = self.experts[expert_id][shard_id]
        if shard.module is None or kind not in shard.kinds:
            raise CheckpointError(f"tensor {shard.name}.{kind}: config.json lists no such tensor for {shard.name}")
        if self.local(expert_id) == -1:
            return False
        parts = self.waiting.setdefault((expert_id, shard_id), {})
        dense = self.dense[shard_id == DOWN]
        # A copy, since the file may be closed, on the device that serves the expert.
        parts[kind] = tensor.to(dense.device, copy=True)
        if len(parts) < len(shard.kinds):
            return True
        del self.waiting[expert_id, shard_id]
        self.done.add((expert_id, shard_id))
        weight = reconstruct(parts, torch.float32, shard.name).to(dense.dtype)
        check_finite(weight, f"{shard.name}.weight")
        return self.loads(
            dense, weight, f"{expert_parameter(shard_id)}_weight", shard_id, expert_id, return_success=True
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's own; raises CheckpointError where a factor has not come."""
        for number, expert in enumerate(self.experts):
            for shard_id, shard in expert.items():
                here = self.local(number) != -1 and not self.is_dummy
                if here and shard.module is not None and (number, shard_id) not in self.done:
                    raise CheckpointError(f"{shard.name}: not all of its factors are in the checkpoint")
        super().process_weights_after_loading(layer)
        # vLLM has packed the dense parameters.
        self.dense.clear()
        self.packed = True


def loaded_twice(experts: list[Expert]) -> CheckpointError:
    """The error for a second load."""
    return CheckpointError(f"{experts[0][GATE].name}: factored experts are loaded once; restart the server")
