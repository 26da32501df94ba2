"""The dense model that a config.json describes, without weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from pgsvd_vllm.hf.transformers_compat import Conv1D, skeleton
from pgsvd_vllm.offline.model.source import auto_class_of, cannot_build


def dense_skeleton(written: Path, config: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device; raises InputError if transformers cannot build it.

    Args:
        written: folder with config.json, and the model's own code if it is trusted.
        config: this config.json.
        folder: that it comes from, for errors.
        trust_remote_code: run the model's own code.
    """
    auto_class = auto_class_of(config, folder)
    try:
        auto = AutoConfig.from_pretrained(written, trust_remote_code=trust_remote_code)
        return skeleton(auto_class, auto, torch.float32, trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise cannot_build(error, config, folder, trust_remote_code) from None


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Linear layer of a model, the LM head and GPT-2's transposed ones included -> (out, in)."""
    found = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    transposed = {name: m.weight.shape[::-1] for name, m in model.named_modules() if isinstance(m, Conv1D)}
    return {name: (shape[0], shape[1]) for name, shape in {**found, **transposed}.items()}
