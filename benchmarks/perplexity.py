"""Perplexity of a model on text: exp of the mean negative log likelihood of every token but the first."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.offline.model.device import gemm_dtype


@contextlib.contextmanager
def _cast(model: PreTrainedModel) -> Iterator[None]:
    """The model in a dtype that this processor multiplies in; its own tensors are put back afterwards."""
    stored, dtype = model.dtype, gemm_dtype(model.device, model.dtype)
    if dtype == stored:  # nothing is cast: float32 buffers, such as rotary frequencies, stay as they are
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    own = [tensor.data for tensor in tensors]
    for tensor in tensors:
        if tensor.dtype == stored:
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int = 4, desc: str = "perplexity") -> float:
    """Perplexity over token windows; a non-finite loss is not skipped but makes the result NaN.

    Args:
        model: a causal language model; it is left as it was, and computes in float32 where this processor has no
            instructions for its dtype.
        windows: int64 [count, length]; every window is predicted from its own start.
        batch: windows at a time.
        desc: of the progress bar.
    """
    total, count = 0.0, 0
    with _cast(model):
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
