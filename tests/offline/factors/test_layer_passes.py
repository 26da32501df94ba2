"""Activations that do not fit into memory are computed again, with the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.offline.compress import calibrate, choose, store_layers
from pgsvd_vllm.offline.factors import shard
from pgsvd_vllm.offline.model import batch
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from tests.conftest import save_tiny_model

WINDOWS, LENGTH = 24, 48


def made(plan: Plan, kept: int | None) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The factors of each layer with so many tokens' activations in memory."""
    plan = replace(plan, settings=replace(plan.settings, kept_tokens=kept))
    plan = replace(plan, options=replace(plan.options, output=plan.options.output.with_name(f"kept-{kept}")))
    state = open_state(plan)
    calibrate(plan, state)
    store_layers(plan, state, choose(plan, state, print).allocation.modules, print)
    found = [state.load_factors(index).tensors for index in range(len(plan.projections.layers))]
    state.close()
    return found


@pytest.mark.parametrize("kept", [1, 9 * LENGTH])
def test_repeated_passes_give_the_same_bits(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "TOKENS_PER_BATCH", 4 * LENGTH)
    model = save_tiny_model(tmp_path / "model")
    options = CompressOptions(
        str(model),
        tmp_path / "out",
        dataset=("python-docs",),
        num_calibration_samples=WINDOWS,
        max_seq_length=LENGTH,
        ratio=0.4,
        refine=0,
    )
    plan = make_plan(options)
    assert len(plan.data.batches()) == 6
    passes: list[str] = []
    repeated = shard.RepeatedForward.run_until
    monkeypatch.setattr(
        shard.RepeatedForward, "run_until", lambda self, name: passes.append(name) or repeated(self, name)
    )
    expected = made(plan, None)
    assert not passes
    found = made(plan, kept)
    repeated_batches = 6 - max(1, kept // (4 * LENGTH))
    assert len(passes) >= 3 * repeated_batches * len(expected)
    assert sum(len(layer) for layer in expected) >= 6
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensors in theirs.items():
            for suffix, tensor in tensors.items():
                assert torch.equal(mine[name][suffix], tensor), f"{name}.{suffix}"
