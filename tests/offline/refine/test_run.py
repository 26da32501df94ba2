"""Refining a run finds the model's modules where the checkpoint has other names for them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.offline.compress import calibrate, measured_spectra
from pgsvd_vllm.offline.executor.executor import LocalExecutor
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.options import CompressOptions, Dose
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.select import choose_ranks
from pgsvd_vllm.offline.refine.run import Distillation
from tests.offline.refine.test_distill import count_time_by_steps


def test_renamed_modules_are_refined(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where transformers renames a checkpoint's modules while it loads them."""
    count_time_by_steps(monkeypatch, seconds=0.05)
    options = CompressOptions(
        str(tiny_model), tmp_path / "out", ratio=0.4, refine=0.02, num_calibration_samples=16, max_seq_length=64
    )
    plan = make_plan(options)
    renamed = [[replace(p, name=f"old.{p.name}", module=p.path) for p in row] for row in plan.projections.layers]
    plan = plan.with_projections(replace(plan.projections, layers=renamed))
    state = open_state(plan)
    calibrate(plan, state)
    modules = choose_ranks(plan.projections, measured_spectra(plan, state), plan.target).modules
    run = (plan.source, plan.data, plan.settings, plan.projections, state)
    factor_layers(*run[1:], modules, LocalExecutor(plan.source, plan.settings.device, torch.float32))
    before = {name: row for index in range(3) for name, row in state.load_factors(index).tensors.items()}
    said: list[str] = []
    assert Distillation(*run).run(Dose(minutes=0.02), modules, said.append)
    after = {name: row for index in range(3) for name, row in state.load_factors(index).tensors.items()}
    assert before.keys() == after.keys() == modules.keys()
    assert all(name.startswith("old.model.layers.") for name in after)
    assert len(said) == 1
    assert any(not torch.equal(row[s], after[name][s]) for name, row in before.items() for s in row)
