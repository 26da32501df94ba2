"""SiLU taken over from vLLM's models: a factored gate and up layer computes silu(gate) * up itself, on GPUs.

Only from MLPs whose forward is known to do nothing else with the layer's output than to hand it to `act_fn`, and
not with LoRA, which adds to that output.
"""

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

import pgsvd_vllm
from pgsvd_vllm.families import SILU_MLPS
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod

logger = logging.getLogger("vllm.pgsvd")


def fuse_silu(model: nn.Module, config: VllmConfig) -> int:
    """Let factored layers compute the activations after them; before their weights are loaded.

    The model's graph is another one then: `config` gets what vLLM tells stored graphs apart by.

    Returns:
        how many do.
    """
    additional = config.additional_config
    if not current_platform.is_cuda_alike() or config.lora_config is not None or not isinstance(additional, dict):
        return 0
    from pgsvd_vllm.serving.gemm.gpu import wants_triton

    taken: list[str] = []
    for module in model.modules() if wants_triton() else ():
        layer: Any = getattr(module, "gate_up_proj", None)
        method = getattr(layer, "quant_method", None)
        known = f"{type(module).__module__}.{type(module).__qualname__}" in SILU_MLPS
        activation = getattr(module, "act_fn", None)
        if not known or not isinstance(method, PgsvdLinearMethod) or type(activation) is not SiluAndMul:
            continue
        if len(method.shards) == 2 and method.cut is Cut.REPLICATED:
            method.activation = _eager(activation)
            module.act_fn = nn.Identity()
            taken.append(method.layer_name)
    if taken:
        names = hashlib.sha256(" ".join(taken).encode()).hexdigest()
        additional["pgsvd"] = f"{len(taken)} activations ({names}), {pgsvd_vllm.__version__}"
        logger.info("%d factored layers compute the activation after them", len(taken))
    return len(taken)


def _eager(activation: SiluAndMul) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's kernel, whatever `forward` is while a model is compiled."""
    return activation.forward_cuda if hasattr(activation, "op") else activation.forward_native
