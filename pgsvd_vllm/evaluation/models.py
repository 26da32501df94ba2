"""Loads dense and compressed models for evaluation in transformers, and asks them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.families import DUAL_ENCODERS
from pgsvd_vllm.format.reader import read_config
from pgsvd_vllm.hf.transformers_compat import CAUSAL_LM_CLASSES, IMAGE_TEXT_TO_TEXT_CLASSES
from pgsvd_vllm.offline.model.device import gemm_dtype
from pgsvd_vllm.offline.model.free_memory import free_memory


def load_model(folder: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """A language model or vision-language model, in float32 where that is faster on the device.

    Raises:
        InputError: transformers cannot load it, tensors are missing, it predicts no text, or memory is short.
        CheckpointError: config.json is missing or damaged.
    """
    named = [str(name) for name in read_config(folder).get("architectures") or []]
    if any(name in DUAL_ENCODERS for name in named):
        raise InputError(f"{folder}: {', '.join(named)} predicts no text; evaluate takes models that do")
    images = IMAGE_TEXT_TO_TEXT_CLASSES.intersection(named) and not CAUSAL_LM_CLASSES.intersection(named)
    auto_class: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    try:
        model, found = auto_class.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model = model.to(device)
        dtype = gemm_dtype_of(model)
        # A cast to its own dtype would round float32 buffers, such as rotary frequencies.
        model = model if dtype == model.dtype else model.to(dtype)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{folder}: transformers cannot load it ({reason_of(error)})") from None
    if found["missing_keys"]:
        raise InputError(f"{folder}: tensor {min(found['missing_keys'])} that the architecture needs is missing")
    return model.eval()


def gemm_dtype_of(model: Any) -> torch.dtype:
    """The fastest dtype of a model's GEMMs on its device; its own where a copy of the weights does not fit."""
    dtype, free = gemm_dtype(model.device, model.dtype), free_memory(model.device)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return model.dtype if dtype != model.dtype and free is not None and needed > free else dtype


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], most: int) -> list[str]:
    """The greedy answer to each prompt, of at most `most` tokens, through the chat template where there is one."""
    found = []
    for prompt in prompts:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "token_type_ids"}
        tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, temperature=None, top_p=None)
        found.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found
