"""Loads checkpoints as a vLLM worker does, one after the other, and prints an outcome for each.

    python tests/serving/load_each.py < CASES

A line of CASES is a JSON object: `model` (folder or hub id), `load_format`, `dtype`, `extra` (of the loader).
"""

import json
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader import get_model_loader

from pgsvd_vllm.plugin import register


def load(case: dict[str, Any]) -> nn.Module:
    config = VllmConfig(
        model_config=ModelConfig(model=case["model"], dtype=case["dtype"], max_model_len=64, enforce_eager=True),
        load_config=LoadConfig(load_format=case["load_format"], model_loader_extra_config=case["extra"]),
        device_config=DeviceConfig("cpu"),
    )
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        return loader.load_model(vllm_config=config, model_config=config.model_config)


def main() -> None:
    register()
    # Part of a worker's start on CPU: torch has no accelerator whose cache could be emptied.
    torch.accelerator.empty_cache = lambda: None
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
        for line in sys.stdin:
            try:
                model: Any = load(json.loads(line))
            except Exception as error:
                print("OUTCOME", type(error).__name__, " ".join(str(error).split()), flush=True)
            else:
                print("OUTCOME loaded, norm", model.model.norm.weight[0].item(), flush=True)


if __name__ == "__main__":
    main()
