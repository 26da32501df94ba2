"""Factored checkpoints with chosen factors, and transformers' tokens and log-probabilities for them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import pgsvd_vllm.hf
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import FORMAT_VERSION, LOAD_GUARD, QUANT_METHOD
from pgsvd_vllm.format.writer import TensorWriter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Factors = tuple[torch.Tensor, torch.Tensor]


def write_checkpoint(
    source: Path, target: Path, factor: Callable[[str, torch.Tensor], Factors | None], max_bytes: int = 2**31
) -> Path:
    """A factored checkpoint from a dense folder.

    Args:
        source: an ordinary model folder with one model.safetensors.
        target: folder to make.
        factor: module name and weight [out, in] -> (u, v), or None where it stays dense.
        max_bytes: of one weight file.
    """
    target.mkdir(parents=True)
    writer = TensorWriter(target, max_bytes)
    modules = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        is_projection = suffix == "weight" and module.rpartition(".")[2] in PROJECTIONS
        factors = factor(module, tensor) if is_projection else None
        if factors is None:
            writer.add(name, tensor)
            continue
        u, v = factors
        writer.add(f"{module}.weight_v", v)
        writer.add(f"{module}.weight_u", u)
        modules[module] = {"rank": v.shape[0], "form": "factors"}
    writer.close()
    # In the order of the model, as the tool writes it.
    layers = list(dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in modules))
    modules = {
        name: modules[name]
        for layer in layers
        for leaf in PROJECTIONS
        for name in modules
        if name.startswith(f"{layer}.") and name.endswith(f".{leaf}")
    }
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["transformers_weights"] = LOAD_GUARD
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "modules": modules,
        "tensors": writer.count,
        "method": "pgsvd",
        "tolerance": {},
        "base_model": str(source),
        "calibration": {"name": "none", "tokens": 0},
        "tool_version": pgsvd_vllm.__version__,
        "command": "tests",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    open_checkpoint(target)
    return target


def reconstruct_dense(source: Path, target: Path) -> Path:
    """The reconstructed dense model of a factored float32 checkpoint."""
    target.mkdir()
    checkpoint = open_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        tensors.update(load_file(path))
    for name, module in checkpoint.modules.items():
        parts = [tensors.pop(f"{name}.{suffix}") for suffix in module.suffixes]
        if module.form == "pivot":
            p, c, pivots = parts
            u = torch.empty(len(p) + len(c), len(p), dtype=torch.float64)
            others = torch.ones(len(u), dtype=torch.bool)
            others[pivots.long()] = False
            u[pivots.long()], u[others] = torch.eye(len(p), dtype=torch.float64), c.double()
            weight = u @ p.double()
        else:
            weight = parts[1].double() @ parts[0].double()
        tensors[f"{name}.weight"] = weight.float()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"], config["transformers_weights"]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for pattern in ("*token*.json", "*processor*.json", "*.jinja"):
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    return target


def identity(_module: str, weight: torch.Tensor) -> Factors:
    """V = I, U = W: exactly the dense layer's function."""
    return weight, torch.eye(weight.shape[1], dtype=weight.dtype)


def truncated(weight: torch.Tensor, rank: int) -> Factors:
    """The best factors of a rank in the Frobenius norm."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype).contiguous(), (root[:, None] * vh[:rank]).to(weight.dtype)


def transformers_greedy(folder: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers in float32; the prompts have one length, so nothing is padded."""
    from transformers import AutoModelForCausalLM

    return greedy_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts, new_tokens)


@torch.no_grad()
def greedy_of(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of a loaded model; the prompts have one length."""
    ids = torch.tensor(prompts)
    # Not stopping at the end token, as ignore_eos in vLLM.
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    return output[:, ids.shape[1] :].tolist()


@torch.no_grad()
def transformers_logprobs(
    folder: Path, prompts: Sequence[list[int]], answers: Sequence[list[int]], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Log probabilities at every step of given answers, [prompts, steps, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.float().log_softmax(-1))
    return torch.stack(rows)
