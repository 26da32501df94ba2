"""LoRA of PEFT on compressed models, and every private name of PEFT that this takes, each with its reason.

PEFT chooses how to adapt a layer by the layer's class. It does not know the classes of `low_rank_linear`: it refuses
adapters that name such a layer, and `all-linear` leaves it out. Its documented extension is a mapping of classes in one
LoraConfig, which is not saved, so that a saved adapter would not load again. Importing this module puts a subclass in
the place of PEFT's LoraModel instead.
"""

from typing import Any

import torch

# The table in which PEFT looks up the class that adapts a model.
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
from peft.tuners.lora import Linear

# What `all-linear` means for dense layers.
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.hf.low_rank_linear import LowRankLinear, with_update

# The values of `init_lora_weights` that leave the dense weight alone.
INITIALIZATIONS = (True, False, "gaussian")


class LoraLowRankLinear(Linear):
    """A low-rank layer with LoRA adapters: y = W x + b + s B A x.

    PEFT recognizes linear layers that have adapters by the word in the name of the class.
    """

    base_layer: Any

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """Plain LoRA alone. DoRA and other variants compute with the dense weight; PEFT refuses them."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            InputError: its initialization needs the dense weight.
        """
        if config.init_lora_weights not in INITIALIZATIONS:
            raise InputError(
                f"init_lora_weights={config.init_lora_weights!r} needs dense weights, which compressed layers lack; "
                f"use one of {', '.join(map(repr, INITIALIZATIONS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises InputError always: merged factors have another rank, so that `merge_and_unload` makes a new layer."""
        raise InputError("adapters of compressed layers are merged by merge_and_unload() alone")

    # PEFT calls it in place of `merge` where a layer has it.
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer without its adapters, added to its weight if `merge`: rank r becomes r plus the adapters' ranks.

        Args:
            merge: add the adapters to the weight.
            safe_merge: check the sum for NaN and infinity.
            adapter_names: of the adapters to merge; None for the active ones.

        Raises:
            InputError: the merged factors hold NaN or infinity.
        """
        names = [name for name in adapter_names or self.active_adapters if name in self.lora_A]
        if not (merge and names):
            return self.base_layer
        lora_a: Any = self.lora_A
        lora_b: Any = self.lora_B
        b = torch.cat([lora_b[name].weight * self.scaling[name] for name in names], dim=1)
        a = torch.cat([lora_a[name].weight for name in names])
        merged = with_update(self.base_layer, b, a)
        if safe_merge and not all(is_finite(tensor.detach()) for tensor in merged.parameters()):
            dtype = str(merged.weight_v.dtype).removeprefix("torch.")
            raise InputError(f"adapter {', '.join(names)}: the merged factors hold NaN or infinity in {dtype}")
        return merged

    # PEFT would warn of an unknown class.
    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    # PEFT moves new adapters to the device of `weight`, and to its dtype. Packed layers have no dtype of their own.
    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        parameter = next(base_layer.parameters(), None)
        if parameter is None:
            return next(base_layer.buffers()).device, None
        return parameter.device, parameter.dtype


class LowRankLoraModel(LoraModel):
    """PEFT's LoraModel, which also adapts low-rank layers."""

    # The step before PEFT reads the targets.
    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        targets = peft_config.target_modules
        low_rank = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
        if not (low_rank and isinstance(targets, str) and targets.lower() == "all-linear"):
            return
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        # The layer inside of one that has adapters is no target; PEFT includes the latter.
        names = {name for name, module in low_rank if module is not head and not name.endswith(".base_layer")}
        _maybe_include_all_linear_layers(peft_config, model)
        peft_config.target_modules |= names

    # The choice by the layer's class. An adapter of a single parameter, such as `weight_p`, is left to PEFT.
    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, LowRankLinear) and kwargs.get("parameter_name") is None:
            return LoraLowRankLinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    # PEFT would move the adapters to the device of the first parameter, which packed layers lack.
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, LowRankLinear):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # Called before the first layer is merged, so that a refused model keeps its adapters.
    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLowRankLinear):
                continue
            if module.base_layer.schemes:
                raise InputError(
                    f"{name}: adapters cannot be merged into quantized matrices; serve the adapter beside the "
                    "checkpoint: vllm serve DIR --load-format pgsvd --enable-lora --lora-modules NAME=ADAPTER"
                )
            if any(module.lora_bias.values()):
                raise InputError(f"{name}: an adapter with lora_bias=True cannot be merged; train it without")


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LowRankLoraModel
