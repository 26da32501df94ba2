"""The load format `pgsvd`: checks that a factored checkpoint is complete, then loads it."""

import copy
import logging
from collections import Counter
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader

from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.format.reader import check_count, check_factors, check_sums, read_files, read_index
from pgsvd_vllm.format.schema import INDEX_NAME, QUANT_METHOD, FactoredModule, parse_modules
from pgsvd_vllm.serving.dense_fallback import patterns, reconstructed_weights
from pgsvd_vllm.serving.layers.dense import share_graphs
from pgsvd_vllm.serving.layers.fused_silu import fuse_silu
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.layers.lm_head import PgsvdLMHeadMethod
from pgsvd_vllm.serving.layers.moe import FactoredMoEMethod
from pgsvd_vllm.serving.layers.moe_dense import DenseFallbackMoEMethod
from pgsvd_vllm.serving.quant_config import PgsvdConfig
from pgsvd_vllm.serving.vllm_compat.internals import (
    disabled_modules,
    expert_weight_names,
    keep_names_of_factors,
    mark_compiled_graphs,
    path_prefix,
    replace_linear_method,
    replace_lm_head_method,
)
from pgsvd_vllm.serving.vllm_compat.weight_files import IndexedLoader

logger = logging.getLogger("vllm.pgsvd")

# The option of --model-loader-extra-config that reads all weight files once more.
VERIFY = "verify_checksums"


def _log_cuts(model: nn.Module) -> None:
    """Log the memory and the traffic of this tensor-parallel rank."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    factored = [method for method in methods if isinstance(method, PgsvdLinearMethod)]
    factored += [part for method in methods if isinstance(method, FactoredMoEMethod) for part in method.layers]
    cuts = Counter(method.cut.name.lower() for method in factored)
    plans = {id(method.comm_plan): method.comm_plan for method in factored}.values()
    logger.info(
        "Factored layers hold %.3f MB on this rank (%s) and send %d elements per token between ranks, dense layers %d",
        sum(method.nbytes for method in factored) / 1e6,
        ", ".join(f"{count} {name}" for name, count in sorted(cuts.items())),
        sum(plan.sent for plan in plans),
        sum(plan.dense for plan in plans),
    )


def claim_left_out(model: nn.Module, config: PgsvdConfig, vllm_config: VllmConfig) -> None:
    """Give the factored method to layers whose model did not ask for one.

    These are MLPs of SigLIP whose sizes are not multiples of 64, the LM heads of some models, and layers that were made
    under another name than their path in the model, which is where the checkpoint's tensors go: Granite 4's `mixer` is
    `mamba`, and Falcon-H1's attention leaves `self_attn` out.
    """
    for _, module in disabled_modules(model):
        if isinstance(module, LinearBase):
            config.get_quant_method(module, module.prefix)
    for name, module in model.named_modules():
        # Some models make their LM head without its name.
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            head = config.get_quant_method(module, name)
            if isinstance(head, PgsvdLMHeadMethod):
                with set_current_vllm_config(vllm_config):
                    replace_lm_head_method(module, head)
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod):
            for prefix in dict.fromkeys((layer.prefix, path_prefix(layer, path))):
                method = config.get_quant_method(layer, prefix)
                if isinstance(method, PgsvdLinearMethod):
                    with set_current_vllm_config(vllm_config):
                        replace_linear_method(layer, method, prefix)
                    break


@register_model_loader(QUANT_METHOD)
class PgsvdModelLoader(IndexedLoader):
    """vLLM's safetensors loader, with the format's checks before and a check of every tensor after.

    Raises:
        InputError: `verify_checksums` of --model-loader-extra-config is not a boolean.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        config = copy.copy(load_config)
        # vLLM's own file selection accepts only its own format names.
        config.load_format = "safetensors"
        self.verify_checksums: bool = False
        if isinstance(load_config.model_loader_extra_config, dict):
            # vLLM refuses options that it does not know.
            options = dict(load_config.model_loader_extra_config)
            self.verify_checksums = options.pop(VERIFY, False)
            config.model_loader_extra_config = options
        if not isinstance(self.verify_checksums, bool):
            raise InputError(f"--model-loader-extra-config: {VERIFY} is {self.verify_checksums!r}, not true or false")
        super().__init__(config)
        self.vllm_config: VllmConfig | None = None
        # vLLM checks that every parameter was loaded, for quantized models only on request.
        if self.enable_weights_track is None:
            self.enable_weights_track = True

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Check headers against the module table and, if asked, the files against their checksums; then load.

        Raises:
            CheckpointError: the model is not a factored checkpoint, a factor is missing, extra or of the wrong shape,
                there are fewer tensors than promised, or a file is damaged.
        """
        section = getattr(model_config.hf_config, "quantization_config", None)
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"--load-format {QUANT_METHOD}: {model_config.model} is not a pgsvd checkpoint. Leave the flag "
                f"out to serve it as it is, or compress it: pgsvd-vllm compress {model_config.model} -o DIR"
            )
        modules = parse_modules(section, f"{model_config.model}/config.json")
        files = self.weight_files(model_config)
        folder = files[0].parent
        tensors = read_index(folder, INDEX_NAME) if (folder / INDEX_NAME).is_file() else read_files(files)
        check_factors(modules, tensors, model_config.model)
        check_count(section, tensors, model_config.model)
        if self.verify_checksums and get_world_group().local_rank == 0:
            logger.info("SHA-256 checksums of %d files are as recorded", check_sums(folder))
        self.vllm_config = vllm_config
        model = super().load_model(vllm_config, model_config, prefix)
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            _log_cuts(model)
        return model

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        """vLLM's check; reconstructed MoE experts count as loaded, since their method checks their factors."""
        if loaded_weights is not None:
            for name, module in model.named_modules():
                if isinstance(getattr(module, "quant_method", None), DenseFallbackMoEMethod):
                    loaded_weights |= expert_weight_names(name)
        super().track_weights_loading(model, loaded_weights, quantized)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The checkpoint's tensors, with reconstructed weights for dense layers."""
        fallbacks: dict[str, FactoredModule] = getattr(model, "pgsvd_fallbacks", {})
        yield from reconstructed_weights(super().get_all_weights(model_config, model), fallbacks)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Prepare the model's layers for factors, then load the weights."""
        if self.vllm_config is not None:  # None in a reload
            keep_names_of_factors(model)
            # This loader changes traced code, in ways that depend on the model: graphs of other loaders do not fit.
            mark_compiled_graphs(self.vllm_config, load_format=QUANT_METHOD)
            config = self.vllm_config.quant_config
            if isinstance(config, PgsvdConfig):
                claim_left_out(model, config, self.vllm_config)
            share_graphs(model, self.vllm_config)
            fuse_silu(model, self.vllm_config)
            if isinstance(config, PgsvdConfig):
                self._prepare_fallbacks(model, model_config, config)
        super().load_weights(model, model_config)

    def _prepare_fallbacks(self, model: nn.Module, model_config: ModelConfig, config: PgsvdConfig) -> None:
        """Find the dense fallbacks; raises CheckpointError for a module that no layer has claimed."""
        made: Any = model
        fallbacks = config.dense_fallbacks(model)
        made.pgsvd_fallbacks = fallbacks  # for a reload, which another loader does
        if fallbacks:
            logger.warning(
                "%d factored modules are dense layers in vLLM's model: their weights are reconstructed, with the size "
                "and speed of dense ones. Compress again with --ignore %s to keep them exact",
                len({id(module) for module in fallbacks.values()}),
                " ".join(patterns(fallbacks)),
            )
        assert self.vllm_config is not None
        # A pipeline stage has only some of the layers, and so has a draft model from the target's own checkpoint.
        if self.vllm_config.parallel_config.pipeline_parallel_size == 1 and model_config.runner_type != "draft":
            config.check_claimed()
