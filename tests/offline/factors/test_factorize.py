"""The norm of the fit, recomputed from independent forward passes of the calibration text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgsvd_vllm.offline.calibration.loss_metric import FIT_INPUT_DAMPING
from pgsvd_vllm.offline.compress import calibrate, measured_spectra
from pgsvd_vllm.offline.executor.executor import LocalExecutor
from pgsvd_vllm.offline.factors import factorize, problem
from pgsvd_vllm.offline.factors.error_aware import Target
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.factors.problem import FitProblem
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.select import choose_ranks
from tests.offline.calibration.test_gram import clipped, reference_inputs


def test_the_norm_is_that_of_all_tokens_plus_the_shift(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factorize, "SEQUENTIAL_TOKENS", 8 * 64)  # 8 of 24 windows
    plan = make_plan(
        CompressOptions(
            str(tiny_model), tmp_path / "out", ratio=0.5, dtype="float32", num_calibration_samples=24, max_seq_length=64
        )
    )
    state = open_state(plan)
    calibrate(plan, state)
    targets: list[tuple[str, Target]] = []
    norms: list[torch.Tensor] = []
    solve, closed_form = factorize.solve, problem.closed_form

    def recorded_solve(source: ModelSource, device: torch.device, one: FitProblem, shared: Any) -> Any:
        targets.append((one.projection.name, shared[1]))
        return solve(source, device, one, shared)

    def recorded_form(weight: torch.Tensor, gram: torch.Tensor, *rest: Any) -> Any:
        norms.append(gram)
        return closed_form(weight, gram, *rest)

    monkeypatch.setattr(factorize, "solve", recorded_solve)
    monkeypatch.setattr(problem, "closed_form", recorded_form)
    modules = choose_ranks(plan.projections, measured_spectra(plan, state), plan.target).modules
    executor = LocalExecutor(plan.source, plan.settings.device, torch.float32)
    factor_layers(plan.data, plan.settings, plan.projections, state, modules, executor)

    every = reference_inputs(tiny_model, plan.data.windows.ids)
    assert len(targets) == len(norms) > 5
    shifted = 0
    for (name, target), norm in zip(targets, norms, strict=True):
        index = int(name.split(".")[2])
        x = clipped(every[name])
        fitted = clipped(every[name][:8])
        weighted_gram = state.load_sensitivity(index, "measured").grams[name].double().numpy()
        change = target.gram.numpy() - fitted.T @ fitted
        expected = ((x.T @ x + change) / plan.data.windows.ids.numel() + weighted_gram) / 2
        expected += FIT_INPUT_DAMPING * np.trace(expected) / len(expected) * np.eye(len(expected))
        np.testing.assert_allclose(norm.numpy(), expected, atol=1e-4 * np.abs(expected).max())
        shifted += bool(np.abs(change).max() > 1e-2 * np.abs(x.T @ x).max())
    assert shifted > 5, "no Gram matrix was shifted: nothing was tested"
