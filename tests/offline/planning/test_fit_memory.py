"""Plans within a memory budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.model import batch
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning import fit_memory, memory
from pgsvd_vllm.offline.planning.fit_memory import available, fit_activations
from pgsvd_vllm.offline.planning.memory import (
    FACTORS,
    PROGRAM_BYTES,
    gram_sizes,
    layer_inputs,
    memory_bytes,
    stage_bytes,
)
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import prepare
from tests.conftest import save_tokenizer

GIB = 2**30


def asked(model: Path, output: Path, budget: int | None = None) -> CompressOptions:
    return CompressOptions(
        str(model),
        output,
        dataset=("python-docs",),
        num_calibration_samples=24,
        max_seq_length=48,
        refine=0,
        memory_budget=budget,
    )


@pytest.mark.parametrize(
    ("free", "budget", "expected"),
    [(3 * GIB, None, 3 * GIB), (None, 2 * GIB, 2 * GIB), (None, None, None), (GIB, 16 * GIB, GIB), (9 * GIB, GIB, GIB)],
)
def test_the_smaller_of_budget_and_free_memory_counts(
    free: int | None,
    budget: int | None,
    expected: int | None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is loaded already is part of a budget and comes on top of what is free."""
    plan = make_plan(asked(tiny_model, tmp_path / "out", budget))
    loaded = sum(parameter.nbytes for parameter in plan.source.model.parameters() if not parameter.is_meta)
    assert loaded > 0
    left = None if free is None else free - loaded - PROGRAM_BYTES
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: left)
    assert available(plan) == expected


def test_the_fit_keeps_what_fits(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH", 4 * 48)
    plan = make_plan(asked(tiny_model, tmp_path / "out"))
    assert plan.settings.kept_tokens is None

    def needed(plan: Plan, kept: int | None) -> int:
        return stage_bytes(replace(plan, settings=replace(plan.settings, kept_tokens=kept)))[FACTORS]

    everything = needed(plan, None)
    for room in (everything, everything - 1, needed(plan, 2 * 192), needed(plan, 2 * 192) - 1):
        monkeypatch.setattr(fit_memory, "available", lambda _plan, room=room: room)
        kept = fit_activations(plan, print).settings.kept_tokens
        assert needed(plan, kept) <= room
        assert (kept is None) == (room == everything)
        if kept is not None:  # not less than necessary
            assert needed(plan, kept + 192) > room
    monkeypatch.setattr(fit_memory, "available", lambda _plan: 0)
    assert fit_activations(plan, print).settings.kept_tokens == 192


def test_a_budget_that_cannot_be_kept_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--memory-budget 300\.0 MB: the stage \w+ needs about [\d.]+ MB of memory; give more"
    ):
        compress(asked(tiny_model, tmp_path / "out", 300_000_000))
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputError, match="--memory-budget 0: must be positive"):
        prepare(asked(tiny_model, tmp_path / "other", 0), print)


def test_less_free_memory_than_the_plan_needs_is_a_warning(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(asked(tiny_model, tmp_path / "out"), sensitivity="measured")
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: 0)
    lines: list[str] = []
    prepare(options, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("WARNING: the stage ")
    assert "are available: the run may end for lack of memory; " in lines[0]


def test_the_run_needs_the_largest_of_its_stages(tiny_model: Path, tmp_path: Path) -> None:
    plan = make_plan(asked(tiny_model, tmp_path / "out"))
    stages = stage_bytes(plan)
    assert set(stages) == {"calibration", "gradients", "factors"}
    assert memory_bytes(plan) == max(stages.values())
    assert set(stage_bytes(replace(plan, settings=replace(plan.settings, sensitivity="uniform")))) == {
        "calibration",
        "factors",
    }


def test_a_budget_gives_the_same_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch, memory):
        monkeypatch.setattr(module, "TOKENS_PER_BATCH", 4 * 48)
    compress(asked(tiny_model, tmp_path / "free"))
    plans: list[Plan] = []
    monkeypatch.setattr(fit_memory, "available", lambda _plan: 0)
    options = replace(asked(tiny_model, tmp_path / "short", 4 * GIB), sensitivity="measured")
    compress(options, look=plans.append)
    assert plans[0].settings.kept_tokens == 192
    found, expected = (
        {
            name: tensor
            for file in sorted((tmp_path / run).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for run in ("short", "free")
    )
    assert found.keys() == expected.keys()
    assert len(found) > 17
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_layer_counts_with_its_experts(tmp_path: Path) -> None:
    """Experts that stay dense are loaded with their layer, and so is its copy where passes are repeated."""
    needed = {}
    for experts in (4, 8):
        folder = tmp_path / f"experts-{experts}"
        config = MixtralConfig(
            vocab_size=save_tokenizer(folder),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=experts,
        )
        MixtralForCausalLM(config).save_pretrained(folder)
        plan = make_plan(asked(folder, tmp_path / "out"))
        assert sum(len(row) for row in plan.projections.layers) == 8
        for kept in (None, 48):
            choice = replace(plan, settings=replace(plan.settings, kept_tokens=kept))
            needed[experts, kept] = stage_bytes(choice)[FACTORS]
    more = 4 * (3 * 64 * 96 + 64) * 4  # experts and rows of the router in float32
    assert needed[8, None] - needed[4, None] == more
    assert needed[8, 48] - needed[4, 48] == 2 * more


def test_inputs_are_those_of_the_layer(tiny_model: Path, tmp_path: Path) -> None:
    """Sizes alone do not tell: in this model q, k, v, o, gate and up all have inputs of one size."""
    plan = make_plan(asked(tiny_model, tmp_path / "out"))
    row = plan.projections.layers[0]
    assert [p.name.rpartition(".")[2] for p, _ in layer_inputs(row)] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert gram_sizes(row) == [128, 128, 128, 320]
