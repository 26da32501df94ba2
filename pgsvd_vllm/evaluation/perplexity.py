"""Perplexity of a model on text: exp of the mean negative log likelihood of every token but the first."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.evaluation.models import gemm_dtype_of
from pgsvd_vllm.offline.data.text import read_documents
from pgsvd_vllm.offline.data.tokens import leading_tokens, tokenize
from pgsvd_vllm.offline.model.hub import public_name

# Bytes of float32 logits at a time; larger buffers are slower to fill on a CPU, and a large vocabulary fills memory.
LOGITS_BYTES = 2**30


@contextlib.contextmanager
def _cast(model: PreTrainedModel) -> Iterator[None]:
    """The model in the dtype that this processor is fastest in; its own tensors are put back afterwards."""
    stored, dtype = model.dtype, gemm_dtype_of(model)
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
def window_losses(
    model: PreTrainedModel, windows: torch.Tensor, batch: int = 4, desc: str = "perplexity"
) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens of each window but its first, in nats.

    Args:
        model: a causal language model; it is left as it was, and computes in float32 where that is faster on this
            processor and fits into memory.
        windows: int64 [count, length]; every window is predicted from its own start.
        batch: windows at a time, fewer where their logits exceed LOGITS_BYTES.
        desc: of the progress bar.

    Returns:
        float64 [count]; values that are not finite are kept.
    """
    losses = []
    window_bytes = 4 * windows.shape[1] * model.config.get_text_config().vocab_size
    batch = max(1, min(batch, LOGITS_BYTES // window_bytes))
    with _cast(model):
        for ids in tqdm(windows.split(batch), desc=desc, unit="batch"):
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(each.view(len(ids), -1).double().mean(1).cpu())
    return torch.cat(losses)


def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int = 4, desc: str = "perplexity") -> float:
    """Perplexity over token windows; arguments as of `window_losses`; NaN if it is not finite."""
    value = window_losses(model, windows, batch, desc).mean().exp().item()
    return value if math.isfinite(value) else math.nan


def spread_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], count: int, length: int
) -> torch.Tensor:
    """`count` windows of `length` tokens at equal distances over a text, int64 [count, length].

    Each begins with the tokens that the tokenizer puts in front of a text, such as BOS.

    Raises:
        InputError: the text holds fewer.
    """
    head = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    tokens = tokenize(tokenizer, documents, "text").ids
    body = length - len(head)
    available = len(tokens) // body
    if available < count:
        raise InputError(f"the text fills {available} windows of {length} tokens, {count} are needed")
    starts = [i * available // count * body for i in range(count)]
    return torch.stack([torch.cat([head, tokens[s : s + body]]) for s in starts])


def text_windows(
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    option: str,
    column: str | None = None,
) -> tuple[str, torch.Tensor]:
    """The windows that a command evaluates on, and a line that says which they are.

    Args:
        name: text set, file or folder as of `compress --dataset`; None for docstrings of Python's standard library.
        tokenizer: of the models.
        count: windows.
        length: tokens of each.
        option: that names the text, for errors.
        column: the field of a row that holds its text; None for the usual names.

    Raises:
        InputError: the text cannot be read, or is too short; names the option.
    """
    try:
        # Hub sets are read only so far; the windows then lie in what was read.
        documents = (
            [held_out_prose()] if name is None else read_documents(name, 2 * count * length, tokenizer, column=column)
        )
        windows = spread_windows(tokenizer, documents, count, length)
    except InputError as error:
        text = str(error).replace("`dataset`", option).replace("--dataset", option)
        if option not in text:
            text = f"{option} {name or 'docstrings'}: {text}; give more text, or smaller --num-samples"
        raise InputError(text) from None
    shown = "docstrings" if name is None else public_name(name)
    return f"{shown} ({count} x {length} tokens)", windows


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
