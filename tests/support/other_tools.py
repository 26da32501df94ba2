"""Checkpoints as other tools factor them: their names and shapes on a tiny Llama, and their own arithmetic."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Tensors = dict[str, torch.Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 48
BASIS_GROUPS = [[0, 1], [2]]


class Pair(nn.Module):
    """y = U (V x) + b."""

    def __init__(self, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.v, self.u, self.bias = v, u, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y = (x @ self.v.T) @ self.u.T
        return y if self.bias is None else y + self.bias


class PivotLayer(nn.Module):
    """PIFA: the pivot rows are V x, the others C (V x)."""

    def __init__(self, p: torch.Tensor, c: torch.Tensor, pivots: torch.Tensor, others: torch.Tensor) -> None:
        super().__init__()
        self.p, self.c, self.pivots, self.others = p, c, pivots, others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        z = x @ self.p.T
        y = z.new_empty(*z.shape[:-1], len(self.pivots) + len(self.others))
        y[..., self.pivots], y[..., self.others] = z, z @ self.c.T
        return y


def factors_of(weight: torch.Tensor, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """V [rank, in] and U [out, rank] of a weight."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (s[:rank, None] * v[:rank]).float().contiguous(), u[:, :rank].float().contiguous()


def _ends(v: str, u: str, bias: str, is_short: bool = False) -> Callable[[str], tuple[str, str, str]]:
    def names(module: str) -> tuple[str, str, str]:
        stem = module.removesuffix("_proj") if is_short else module
        return f"{stem}{v}", f"{stem}{u}", f"{stem}{bias}"

    return names


# Tool -> names of V, U and the bias of a projection.
NAMES = {
    "KFAC-SVD/LEMS": _ends(".mod_a.weight", ".mod_b.weight", ".bias"),
    "ASVD": _ends(".BLinear.weight", ".ALinear.weight", ".ALinear.bias"),
    "Dobi-SVD": _ends(".ALinear.weight", ".BLinear.weight", ""),  # it has no usable bias
    "SVD-LLM": _ends("_v_proj.weight", "_u_proj.weight", "_u_proj.bias", is_short=True),
    "Zero-Sum-SVD": _ends(".v_proj.weight", ".u_proj.weight", ".u_proj.bias"),
    "Lillama": _ends(".0.weight", ".1.weight", ".1.bias"),
}
TOOLS = (*NAMES, "PIFA", "Basis Sharing")


def save_as(tool: str, dense: Path, folder: Path) -> PreTrainedModel:
    """Write a tiny Llama as a tool factors it, one projection left dense; returns the model with the tool's arithmetic.

    Args:
        tool: one of TOOLS.
        dense: folder of the tiny model.
        folder: to write.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    folder.mkdir(parents=True)
    tensors: Tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bases: Tensors = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in PROJECTIONS or name.endswith("1.mlp.up_proj"):
            continue
        bias = None if module.bias is None else module.bias.detach().clone()
        v, u = factors_of(module.weight.detach())
        if tool == "Basis Sharing":
            layer, leaf = int(name.split(".")[2]), name.rpartition(".")[2].removesuffix("_proj")
            first = next(group[0] for group in BASIS_GROUPS if layer in group)
            v = bases.setdefault(f"model.{leaf}_basis.{first}.weight", v)
            u = module.weight.detach() @ torch.linalg.pinv(v)
            tensors[f"{name}.weight"] = u
        elif tool == "PIFA":
            del tensors[f"{name}.weight"]
            order = torch.randperm(len(u), generator=torch.Generator().manual_seed(len(name)))
            pivots, others = order[:RANK], order[RANK:].sort().values
            p, c = (u @ v)[pivots], u[others] @ torch.linalg.inv(u[pivots])
            names = (f"{name}.BLinear.weight", f"{name}.ALinear.weight", f"{name}.false_idx", f"{name}.true_idx")
            tensors.update(zip(names, (p, c, pivots, others), strict=True))
            model.set_submodule(name, PivotLayer(p, c, pivots, others))
            continue
        else:
            del tensors[f"{name}.weight"]
            names3 = NAMES[tool](name)
            tensors[names3[0]], tensors[names3[1]] = v, u
            if bias is not None:
                del tensors[f"{name}.bias"]
                tensors[names3[2]] = bias
        model.set_submodule(name, Pair(v, u, bias))
    tensors.update(bases)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for path in dense.glob("*token*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    if tool == "KFAC-SVD/LEMS":
        # Its exporter leaves a weight of one element beside the factors.
        left = {f"{name.removesuffix('mod_a.weight')}weight" for name in tensors if name.endswith("mod_a.weight")}
        tensors = {f"wrapped_model.{n}": t for n, t in {**tensors, **{n: torch.zeros(1) for n in left}}.items()}
        config = {
            "model_type": "low_rank_compressed",
            "auto_map": {"AutoModelForCausalLM": "modeling_low_rank.LowRankCausalLM"},
            "base_config": config,
            "base_model_type": "llama",
            "base_model_id": "someone/tiny-llama",
            "rank_dict": {},
        }
    elif tool == "ASVD":
        config |= {"architectures": ["ASVDLlamaForCausalLM"], "truncation_ranks": {}}
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_asvd_llama.ASVDLlamaForCausalLM"}
    elif tool == "Basis Sharing":
        config |= {f"{kind}_groups": BASIS_GROUPS for kind in ("q", "k", "v", "o", "gate", "up", "down")}
        config["architectures"] = ["ShareLlamaForCausalLM"]
    elif tool == "SVD-LLM":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    return model
