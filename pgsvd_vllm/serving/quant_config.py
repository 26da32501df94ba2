"""vLLM's view of the module table: which layer is factored, and how."""

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import StageMissingLayer

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import PACKED_MODULES
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import QUANT_METHOD, FactoredModule, parse_modules
from pgsvd_vllm.parallel.comm_plan import CommPlan, collective_bytes
from pgsvd_vllm.serving.dense_fallback import patterns
from pgsvd_vllm.serving.layers.linear import LayerShard, PgsvdLinearMethod
from pgsvd_vllm.serving.layers.lm_head import PgsvdLMHeadMethod
from pgsvd_vllm.serving.layers.moe import moe_method

# vLLM puts this before the names of a draft model's layers (speculative decoding), where the table has plain ones.
DRAFT_PREFIX = "draft_model."


@register_quantization_config(QUANT_METHOD)
class PgsvdConfig(QuantizationConfig):
    """The `quantization_config` of a factored checkpoint.

    Attributes:
        modules: checkpoint module name (in vLLM's naming once a mapper was applied) -> its form.
        head: name of the output head in the checkpoint, if that is factored.
        claimed: ids of those forms that a layer has taken.
    """

    def __init__(self, modules: dict[str, FactoredModule], head: str | None = None) -> None:
        super().__init__()
        self.modules = modules
        self.head = head
        self.claimed: set[int] = set()
        self.traffic = CommPlan(collective_bytes())

    def __repr__(self) -> str:
        return f"PgsvdConfig({len(self.modules)} factored modules)"

    def get_name(self) -> Any:
        """The method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Factors are plain float matrices: every float dtype works."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No minimum GPU capability."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PgsvdConfig":
        """Parse the section of config.json; raises CheckpointError."""
        return cls(parse_modules(config, "config.json"), config.get("head"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check a local checkpoint's files before anything is allocated; raises CheckpointError."""
        if Path(model_name).is_dir():
            open_checkpoint(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add vLLM's names of the modules; names already known stay, so it can be applied twice."""
        # Rules may end in a dot, so they are shown names of tensors.
        named = hf_to_vllm_mapper.apply_dict({f"{name}.weight": module for name, module in self.modules.items()})
        self.modules |= {name.removesuffix(".weight"): module for name, module in named.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The factored method for a linear layer or a mixture with anything factored, or a factored output head."""
        if isinstance(layer, RoutedExperts):
            method = moe_method(layer, prefix, prefix.removeprefix(DRAFT_PREFIX), self.modules, self.traffic)
            if method is not None:
                self.claimed |= {id(shard.module) for expert in method.experts for shard in expert.values()}
            return method
        if isinstance(layer, ParallelLMHead):
            head = self.modules.get(prefix.removeprefix(DRAFT_PREFIX))
            if head is None:
                return None
            self.claimed.add(id(head))
            return PgsvdLMHeadMethod(prefix, head)
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.removeprefix(DRAFT_PREFIX).rpartition(".")
        # What a model says its layer is merged of; the layer itself, which may be merged in the checkpoint as well,
        # whatever the model says; and what its name says, since not every model says anything.
        said = self.packed_modules_mapping.get(leaf, [leaf])
        for leaves in (said, [leaf], PACKED_MODULES.get(leaf, [])):
            names = [f"{parent}.{part}" if parent else part for part in leaves]
            shards = [LayerShard(name, self.modules.get(name)) for name in names]
            if any(shard.module is not None for shard in shards):
                self.claimed |= {id(shard.module) for shard in shards}
                return PgsvdLinearMethod(shards, self.traffic)
        return UnquantizedLinearMethod()

    def dense_fallbacks(self, model: torch.nn.Module) -> dict[str, FactoredModule]:
        """The factored modules that are plain matrices in a model, which cannot be served in factors.

        Returns:
            their forms by all of their names; they count as taken.
        """
        plain, absent = set(), set()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, torch.nn.Linear):
                plain.add(name)
            # vLLM does not make towers whose input is switched off, but their layers are there.
            hidden = module.module if isinstance(module, StageMissingLayer) else None
            inner = hidden.named_modules() if hidden is not None else ()
            absent |= {f"{name}.{one}" for one, linear in inner if isinstance(linear, torch.nn.Linear)}
        found = {id(module) for name, module in self.modules.items() if name in plain} - self.claimed
        self.claimed |= found | {id(module) for name, module in self.modules.items() if name in absent}
        return {name: module for name, module in self.modules.items() if id(module) in found}

    def check_claimed(self) -> None:
        """Raise CheckpointError naming a factored module that no layer of the model has taken."""
        left = {name: module for name, module in self.modules.items() if id(module) not in self.claimed}
        if not left:
            return
        first = next(iter(left))
        if ".experts." in first:
            instead = "without --include experts"
        elif first == self.head:
            instead = "without --include lm_head"
        else:
            others = {name: module for name, module in left.items() if ".experts." not in name and name != self.head}
            instead = f"with --ignore {' '.join(patterns(others))}"
        raise CheckpointError(
            f"{first}: vLLM's model has no linear layer of this name, so its factors cannot be served; compress the "
            f"model {instead}"
        )
