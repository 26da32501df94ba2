"""The op that puts the outputs of several GEMMs in order."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import pgsvd_vllm.serving.gemm.cpu  # noqa: F401  (registers the op)


@pytest.mark.parametrize("ordered", [False, True])
def test_outputs_are_joined_in_order(ordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(5, width, generator=generator) for width in (3, 8, 4)]
    order = torch.randperm(15, generator=generator)[:12] if ordered else None
    whole = torch.cat(outputs, dim=1)
    found = torch.ops.pgsvd.joined(outputs, order)
    assert torch.equal(found, whole if order is None else whole[:, order])
    torch.library.opcheck(torch.ops.pgsvd.joined, (outputs, order))


def test_number_of_tokens_stays_dynamic() -> None:
    """A fake that fixes it makes vLLM's compilation fail."""
    compiled = torch.compile(torch.ops.pgsvd.joined, dynamic=True, fullgraph=True)
    order = torch.tensor([2, 0, 1])
    for tokens in (4, 7):
        outputs = [torch.randn(tokens, 2), torch.randn(tokens, 1)]
        assert torch.equal(compiled(outputs, order), torch.cat(outputs, 1)[:, order])
    torch._dynamo.mark_dynamic(outputs[0], 0)
    torch._dynamo.mark_dynamic(outputs[1], 0)
    assert torch.equal(compiled(outputs, order), torch.cat(outputs, 1)[:, order])
