"""Builds vLLM's model class without weights and without an engine."""

import tempfile

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.utils import initialize_model  # internal: what the model loaders call
from vllm.utils.torch_utils import set_default_torch_dtype  # internal: the dtype in which the model loaders build


def meta_model(folder: str, quant_config: QuantizationConfig, trust_remote_code: bool) -> tuple[nn.Module, VllmConfig]:
    """vLLM's model on the meta device with the methods of a quantization config, and the engine's configuration.

    Args:
        folder: of a dense model; only its config.json is read.
        quant_config: in place of that of the model.
        trust_remote_code: run code that comes with the model.
    """
    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, trust_remote_code=trust_remote_code
    )
    config = arguments.create_engine_config()
    config.quant_config = quant_config
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            with tempfile.TemporaryDirectory() as store:
                init_distributed_environment(1, 0, f"file://{store}/store", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            return initialize_model(config), config
