"""vLLM's quantization method `pgsvd`: the layers of a model that are factored, and their methods."""

from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import PACKED_MODULES, PARTITIONS
from pgsvd_vllm.format.reader import check_every_file, open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME, QUANT_METHOD, FactoredModule, parse_modules
from pgsvd_vllm.parallel.comm_plan import CommPlan, collective_bytes
from pgsvd_vllm.serving.dense_fallback import patterns
from pgsvd_vllm.serving.graph_sizes import capture_prompts
from pgsvd_vllm.serving.layers.layer_shard import LayerShard
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.layers.lm_head import PgsvdLMHeadMethod
from pgsvd_vllm.serving.layers.moe import moe_method
from pgsvd_vllm.serving.loaded_files import LoadedFiles
from pgsvd_vllm.serving.vllm_compat.internals import checkpoint_name, disabled_modules


@register_quantization_config(QUANT_METHOD)
class PgsvdConfig(QuantizationConfig):
    """The `quantization_config` of a factored checkpoint.

    Args:
        modules: checkpoint module name -> its form.
        section: of config.json.

    Attributes:
        modules: as given, and once a mapper was applied also by vLLM's names.
        files: of the checkpoint, checked after they were loaded.
        claimed: ids of the forms that a layer has taken.
        comm_plan: chooses the layers' tensor-parallel cuts; reads PGSVD_COLLECTIVE_BYTES once, here.

    Raises:
        InputError: PGSVD_COLLECTIVE_BYTES is not a number of bytes.
    """

    def __init__(self, modules: dict[str, FactoredModule], section: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.modules = modules
        self.files = LoadedFiles(section or {}, dict(modules))
        self.claimed: set[int] = set()
        self.comm_plan = CommPlan(collective_bytes())

    def __repr__(self) -> str:
        return f"PgsvdConfig({len(self.modules)} factored modules)"

    def get_name(self) -> Any:
        """The method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every float dtype: what has no kernel for it is dequantized."""
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
        return cls(parse_modules(config, "config.json"), config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check a local checkpoint's files before anything is allocated; raises CheckpointError."""
        self.files.model, self.files.revision = model_name, revision
        folder = Path(model_name)
        if not folder.is_dir():
            return
        if (folder / INDEX_NAME).exists() or "tensors" not in self.files.section:
            open_checkpoint(folder)
        else:  # a hub cache that vLLM's own loader filled, which leaves out the index
            check_every_file(folder, self.files.section, self.files.modules)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add vLLM's names of the modules; the old names stay, so it can be applied twice."""
        # A mapper's rules may end in a dot: they are applied to names of tensors.
        named = hf_to_vllm_mapper.apply_dict({f"{name}.weight": module for name, module in self.modules.items()})
        self.modules |= {name.removesuffix(".weight"): module for name, module in named.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The factored method for a linear layer, a MoE layer or an LM head with anything factored."""
        method = self._choose_method(layer, prefix)
        if method is not None:
            self.files.check_before(method)
        return method

    def _choose_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            method = moe_method(layer, prefix, checkpoint_name(prefix), self.modules, self.comm_plan)
            if method is not None:
                self.claimed |= {id(shard.module) for expert in method.experts for shard in expert.values()}
            return method
        if isinstance(layer, ParallelLMHead):
            head = self.modules.get(checkpoint_name(prefix))
            if head is None:
                return None
            self.claimed.add(id(head))
            return PgsvdLMHeadMethod(prefix, head)
        if not isinstance(layer, LinearBase):
            return None
        config = get_current_vllm_config_or_none()
        if config is not None:  # None for layers that have got their first method already
            capture_prompts(config)
        parent, _, leaf = checkpoint_name(prefix).rpartition(".")
        # The model's own mapping comes first; then the layer's own name, since the checkpoint may store the merged
        # matrix; then the usual parts of that name, since not every model has a mapping.
        mapped = self.packed_modules_mapping.get(leaf, [leaf])
        for leaves in (mapped, [leaf], PACKED_MODULES.get(leaf, [])):
            names = {part: f"{parent}.{part}" if parent else part for part in leaves}
            shards = [LayerShard(name, self.modules.get(name), PARTITIONS.get(part, 1)) for part, name in names.items()]
            if any(shard.module is not None for shard in shards):
                self.claimed |= {id(shard.module) for shard in shards}
                return PgsvdLinearMethod(shards, self.comm_plan)
        return UnquantizedLinearMethod()

    def dense_fallbacks(self, model: torch.nn.Module) -> dict[str, FactoredModule]:
        """The factored modules that are torch's linear layers in vLLM's model, which cannot be served in factors.

        Returns:
            their forms by all of their names; they count as claimed.
        """
        modules = model.named_modules(remove_duplicate=False)
        plain = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
        absent = {name for name, module in disabled_modules(model) if isinstance(module, torch.nn.Linear)}
        found = {id(module) for name, module in self.modules.items() if name in plain} - self.claimed
        self.claimed |= found | {id(module) for name, module in self.modules.items() if name in absent}
        return {name: module for name, module in self.modules.items() if id(module) in found}

    def unclaimed(self) -> dict[str, FactoredModule]:
        """The factored modules that no layer of the model has taken, by all of their names."""
        return {name: module for name, module in self.modules.items() if id(module) not in self.claimed}

    def check_claimed(self) -> None:
        """Raise CheckpointError naming a factored module that no layer of the model has taken."""
        left = self.unclaimed()
        if not left:
            return
        first = next(iter(left))
        if left[first].kind == "expert":
            instead = "without --include experts"
        elif left[first].kind == "lm_head":
            instead = "without --include lm_head"
        else:
            linear = {name: module for name, module in left.items() if module.kind == "linear"}
            instead = f"with --ignore {' '.join(patterns(linear))}"
        raise CheckpointError(
            f"{first}: vLLM's model has no linear layer of this name, so its factors cannot be served; compress the "
            f"model {instead}"
        )
