"""The load format `pgsvd`: refuses what is not a complete factored checkpoint, then loads it."""

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.utils import StageMissingLayer

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import check_factors, read_headers
from pgsvd_vllm.format.schema import QUANT_METHOD, FactoredModule, parse_modules
from pgsvd_vllm.hf.weight_mapping import without_weight_norm
from pgsvd_vllm.serving.dense_fallback import patterns, reconstructed_weights
from pgsvd_vllm.serving.layers.dense import share_graphs
from pgsvd_vllm.serving.layers.fused_silu import fuse_silu
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.layers.lm_head import PgsvdLMHeadMethod
from pgsvd_vllm.serving.layers.moe import FactoredMoEMethod
from pgsvd_vllm.serving.layers.moe_dense import DenseFallbackMoEMethod
from pgsvd_vllm.serving.quant_config import PgsvdConfig

logger = logging.getLogger("vllm.pgsvd")


def _tell_cuts(model: nn.Module) -> None:
    """Log what a rank of tensor parallelism holds and sends."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    factored = [method for method in methods if isinstance(method, PgsvdLinearMethod)]
    factored += [part for method in methods if isinstance(method, FactoredMoEMethod) for part in method.layers]
    cuts = Counter(method.cut.name.lower() for method in factored)
    traffic = {id(method.traffic): method.traffic for method in factored}.values()
    logger.info(
        "Factored layers hold %.3f MB on this rank (%s) and send %d numbers a token between ranks, dense ones %d",
        sum(method.nbytes for method in factored) / 1e6,
        ", ".join(f"{count} {name}" for name, count in sorted(cuts.items())),
        sum(one.sent for one in traffic),
        sum(one.dense for one in traffic),
    )


def _take_left_out(model: nn.Module, config: PgsvdConfig) -> None:
    """Give the factored method to layers that did not ask for it.

    MLPs of SigLIP of sizes that 64 does not divide, and output heads of some models.
    """
    # vLLM does not make towers whose input is switched off, but their layers are there.
    left_out = [module.module for module in model.modules() if isinstance(module, StageMissingLayer) and module.module]
    for missing in (module for part in left_out for module in part.modules() if isinstance(module, LinearBase)):
        config.get_quant_method(missing, missing.prefix)
    for name, one in model.named_modules():
        # Some models make their output head without saying what it is called.
        if isinstance(one, ParallelLMHead) and isinstance(one.quant_method, UnquantizedEmbeddingMethod):
            found = config.get_quant_method(one, name)
            if isinstance(found, PgsvdLMHeadMethod):
                found.take_over(one)
    for layer in model.modules():
        if not isinstance(layer, LinearBase) or not isinstance(layer.quant_method, UnquantizedLinearMethod):
            continue
        method = config.get_quant_method(layer, layer.prefix)
        if not isinstance(method, PgsvdLinearMethod):
            continue
        made: Any = layer
        device = made.weight.device
        del made.weight
        made.quant_method = method
        columns = getattr(made, "input_size_per_partition", made.input_size)
        partitions = made.output_partition_sizes if isinstance(layer, ColumnParallelLinear) else [made.output_size]
        with device:
            method.create_weights(layer, columns, partitions, made.input_size, made.output_size, made.params_dtype)
            record_metadata_for_reloading(layer)


@register_model_loader(QUANT_METHOD)
class PgsvdModelLoader(DefaultModelLoader):
    """vLLM's safetensors loader with the format's checks in front and every tensor accounted for."""

    def __init__(self, load_config: LoadConfig) -> None:
        config = copy.copy(load_config)
        # vLLM's own file selection knows no foreign format name.
        config.load_format = "safetensors"
        super().__init__(config)
        self.vllm_config: VllmConfig | None = None
        # vLLM checks that every parameter was loaded, but not for quantized models unless asked.
        if self.enable_weights_track is None:
            self.enable_weights_track = True

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Check headers against the module table, then load.

        Raises:
            CheckpointError: the model is not a factored checkpoint, or a factor is missing, extra
                or of the wrong shape.
        """
        section = getattr(model_config.hf_config, "quantization_config", None)
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"--load-format {QUANT_METHOD}: {model_config.model} is not a pgsvd checkpoint. Leave the flag "
                f"out to serve it as it is, or compress it: pgsvd-vllm compress {model_config.model} -o DIR"
            )
        modules = parse_modules(section, f"{model_config.model}/config.json")
        _, files, _, _ = self._prepare_weights(model_config.model, None, model_config.revision, False, None)
        tensors = {}
        for file in files:
            tensors.update(read_headers(Path(file)))
        check_factors(modules, tensors, model_config.model)
        self.vllm_config = vllm_config
        model = super().load_model(vllm_config, model_config, prefix)
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            _tell_cuts(model)
        return model

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        """vLLM's check, which does not know that experts may come as factors; their method counts them."""
        if loaded_weights is not None:
            for name, module in model.named_modules():
                if isinstance(getattr(module, "quant_method", None), DenseFallbackMoEMethod):
                    loaded_weights |= {f"{name}.w13_weight", f"{name}.w2_weight"}
        super().track_weights_loading(model, loaded_weights, quantized)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The checkpoint's tensors, dense ones for plain matrices."""
        plain: dict[str, FactoredModule] = getattr(model, "pgsvd_plain", {})
        yield from reconstructed_weights(super().get_all_weights(model_config, model), plain)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Settle which layers compute their activations, then load."""
        if self.vllm_config is not None:  # not where weights are loaded again
            config = self.vllm_config.quant_config
            made: Any = model
            mapper = getattr(model, "hf_to_vllm_mapper", None)
            if mapper is not None and mapper.orig_to_new_renaming:
                names = without_weight_norm(mapper.orig_to_new_renaming)
                made.hf_to_vllm_mapper = dataclasses.replace(mapper, orig_to_new_renaming=names)
            if isinstance(config, PgsvdConfig):
                with set_current_vllm_config(self.vllm_config):
                    _take_left_out(model, config)
            share_graphs(model, self.vllm_config)
            fuse_silu(model, self.vllm_config)
            # A stage of a pipeline has only some of the layers, and a draft out of the target's own checkpoint.
            whole = self.vllm_config.parallel_config.pipeline_parallel_size == 1 and model_config.runner_type != "draft"
            if isinstance(config, PgsvdConfig):
                plain = config.dense_fallbacks(model)
                made.pgsvd_plain = plain  # for when weights are loaded again, by another loader
                if plain:
                    logger.warning(
                        "%d factored modules are plain matrices in vLLM's model: they are multiplied back, and as "
                        "large and slow as dense ones. Compressed again with --ignore %s they would be exact",
                        len({id(module) for module in plain.values()}),
                        " ".join(patterns(plain)),
                    )
                if whole:
                    config.check_claimed()
        super().load_weights(model, model_config)
