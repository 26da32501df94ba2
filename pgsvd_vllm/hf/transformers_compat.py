"""All private or unstable names of transformers that this package uses, each with its reason."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

# The KV cache whose layers decoding replaces by ones that are not copied in every step.
from transformers.cache_utils import DynamicCache, DynamicLayer

# The rules by which transformers renames and stacks a checkpoint's tensors; no public function returns them.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

# Random initialisation of a large model takes minutes, and its parameters are replaced.
from transformers.initialization import no_init_weights

# What the attention of a single query leaves to transformers: everything else, and the masks.
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# The classes that an auto class can load.
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# GPT-2's linear layer with a transposed weight.
from transformers.pytorch_utils import Conv1D

# To see whether the format is registered already: registering it twice is an error.
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

__all__ = [
    "AUTO_QUANTIZER_MAPPING",
    "CAUSAL_LM_CLASSES",
    "IMAGE_TEXT_TO_TEXT_CLASSES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "Concatenate",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "loaded_dtype",
    "mark_initialized",
    "rename_source_key",
    "saves_adapters",
    "sdpa_attention_forward",
    "sdpa_mask",
    "skeleton",
    "tied_weights",
]

CAUSAL_LM_CLASSES = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
IMAGE_TEXT_TO_TEXT_CLASSES = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())


def skeleton(auto_class: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model with its parameters on the meta device and its buffers computed.

    Args:
        auto_class: of transformers, such as AutoModelForCausalLM.
        config: of the model.
        dtype: of the parameters.
        trust_remote_code: run modelling code that comes with the model.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():
        return auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Tied tensor -> the tensor that it shares, as transformers resolves a model's `_tied_weights_keys`."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def loaded_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a model that is loaded in `dtype`: some, such as a router's bias, stay in float32.

    A bias in bfloat16 would send tokens to other MoE experts. No public function tells which tensors these are.
    """
    plan = model._get_dtype_plan(dtype)
    return next((kept for part, kept in plan.items() if re.search(rf"(^|\.){part}($|\.)", name)), dtype)


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising a module, whose original children GPT-2's rule would look for."""
    setattr(module, "_is_hf_initialized", True)  # noqa: B010  (no attribute of nn.Module for mypy)


def saves_adapters(model: PreTrainedModel) -> bool:
    """Whether save_pretrained writes the model's adapters alone: those that `model.add_adapter` has added."""
    return getattr(model, "_hf_peft_config_loaded", False)
