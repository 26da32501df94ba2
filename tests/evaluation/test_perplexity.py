"""Perplexity leaves the model as it was."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pgsvd_vllm.evaluation import perplexity


def test_the_callers_model_is_not_changed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor has no instructions for its dtype, and computes in float32."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(perplexity, "gemm_dtype", lambda _device, _dtype: torch.float32)
    found = perplexity.perplexity(model, ids)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).float().eval()
    with torch.no_grad():
        loss = exact(ids, labels=ids).loss
    assert found == pytest.approx(float(loss.exp()), rel=1e-3)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
