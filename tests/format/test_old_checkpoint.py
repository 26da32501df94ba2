"""A checkpoint written by an earlier version loads and computes the same logits."""

import json

import torch
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"


def test_format_version_1_opens_and_its_numbers_are_whole() -> None:
    checkpoint = open_checkpoint(DATA / "checkpoint_v1")
    check_data(checkpoint)
    assert {module.form for module in checkpoint.modules.values()} == {"pivot"}


def test_format_version_1_computes_the_same_logits() -> None:
    """The expected logits are those of the version that wrote it, in float32."""
    known = json.loads((DATA / "checkpoint_v1_logits.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(DATA / "checkpoint_v1", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([known["tokens"]])).logits[0, -1]
    expected = torch.tensor(known["logits"])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[: len(expected)], expected, atol=2e-5, rtol=1e-5)
