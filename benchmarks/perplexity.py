"""Perplexity of a model on text: exp of the mean negative log likelihood of every token but the first."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.offline.model.device import gemm_dtype


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int = 4, desc: str = "perplexity") -> float:
    """Perplexity over token windows; a non-finite loss is not skipped but makes the result NaN.

    Args:
        model: a causal language model; where this processor has no instructions for its dtype it becomes float32.
        windows: int64 [count, length]; every window is predicted from its own start.
        batch: windows at a time.
        desc: of the progress bar.
    """
    dtype = gemm_dtype(model.device, model.dtype)
    if dtype != model.dtype:  # else nothing is cast: buffers in float32, such as rotary frequencies, must stay so
        nn.Module.to(model, dtype)
    total, count = 0.0, 0
    for ids in tqdm(windows.split(batch), desc=desc, unit="batch"):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count) if math.isfinite(total) else math.nan


def held_out_prose(limit: int = 400_000) -> str:
    """English prose that ships with Python and is not in `builtin_prose`: module and function docs."""
    import ast
    import sysconfig

    parts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 300:
                    parts.append(doc)
                    size += len(doc)
        if size > limit:
            break
    return "\n\n".join(parts)
