"""Perplexity leaves the model as it was."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pgsvd_vllm.evaluation import models, perplexity


def test_windows_are_split_where_their_logits_are_large(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.randint(0, 258, (7, 24), generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    expected = perplexity.window_losses(model, ids)
    for limit, batches in ((2**30, [4, 3]), (2 * 24 * 258 * 4, [2, 2, 2, 1]), (1, [1] * 7)):
        sizes.clear()
        monkeypatch.setattr(perplexity, "LOGITS_BYTES", limit)
        assert torch.allclose(perplexity.window_losses(model, ids), expected, rtol=1e-6, atol=0)
        assert sizes == batches


def test_a_model_keeps_its_dtype_where_a_copy_does_not_fit(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    for free, expected in ((4 * count, torch.float32), (4 * count - 1, torch.float16), (None, torch.float32)):
        monkeypatch.setattr(models, "free_memory", lambda _device, free=free: free)
        assert models.gemm_dtype_of(model) == expected


def test_the_callers_model_is_not_changed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor has no instructions for its dtype, and computes in float32."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(perplexity, "gemm_dtype_of", lambda _model: torch.float32)
    found = perplexity.perplexity(model, ids)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).float().eval()
    with torch.no_grad():
        loss = exact(ids, labels=ids).loss
    assert found == pytest.approx(float(loss.exp()), rel=1e-3)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
