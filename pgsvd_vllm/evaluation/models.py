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
from pgsvd_vllm.offline.model.device import gemm_dtype


def load_model(folder: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """A language model or vision-language model, in a dtype that the device multiplies in.

    Raises:
        InputError: transformers cannot load it, or it is a dual encoder.
        CheckpointError: config.json is missing or damaged.
    """
    architectures = read_config(folder).get("architectures") or []
    if any(name in DUAL_ENCODERS for name in architectures):
        raise InputError(f"{folder}: {', '.join(architectures)} predicts no text; evaluate takes models that do")
    failures = []
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            model: Any = auto_class.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises many kinds
            failures.append(reason_of(error))
        else:
            return model.to(device, gemm_dtype(device, model.dtype)).eval()
    raise InputError(f"{folder}: transformers cannot load it ({failures[0]})")


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
