"""Baseline methods against their papers' definitions and through the whole pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.factors.baselines import ASVD_ALPHA, norm_of
from pgsvd_vllm.offline.factors.solvers import closed_form
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.options import BASELINES, CompressOptions
from pgsvd_vllm.offline.ranks.uniform import at_equal_ratio
from pgsvd_vllm.offline.settings import Storage
from tests.conftest import run_cli
from tests.offline.test_compress import check_output, section_of


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize(("m", "n"), [(13, 22), (22, 13)])
def test_each_norm_gives_the_matrix_of_its_paper(m: int, n: int) -> None:
    rng = np.random.default_rng(m)
    w, x = rng.standard_normal((m, n)), rng.standard_normal((n, 90)) * np.geomspace(1, 30, n)[:, None]
    gram = torch.from_numpy(x @ x.T)
    scale = np.diag(np.sqrt(np.diag(x @ x.T)) ** ASVD_ALPHA)
    root = np.linalg.cholesky(x @ x.T)
    expected = {
        "svd": truncated(w, 5),
        "asvd": truncated(w @ scale, 5) @ np.linalg.inv(scale),
        "svd-llm": truncated(w @ root, 5) @ np.linalg.inv(root),
    }
    expected["pifa"] = expected["svd-llm"]
    assert expected.keys() == set(BASELINES)
    for name, matrix in expected.items():
        factors = closed_form(torch.from_numpy(w), norm_of(name, gram), 5)
        np.testing.assert_allclose((factors.u @ factors.v).numpy(), matrix, atol=1e-9 * np.abs(matrix).max())


def test_zero_inputs_give_finite_factors() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    for name in BASELINES:
        factors = closed_form(torch.randn(5, 3, dtype=torch.float64), norm_of(name, gram), 2)
        assert torch.isfinite(factors.u @ factors.v).all()


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8])
def test_every_projection_loses_the_same_ratio(form: str, ratio: float) -> None:
    projections = [Projection("a", 300, 200), Projection("b", 64, 640), Projection("c", 128, 128)]
    allocation = at_equal_ratio(projections, ratio, Storage(form))
    stored = 0
    for p in projections:
        r = allocation.ranks[p.name]

        def size(rank: int, p: Projection = p) -> int:
            plain = rank * (p.out_features + p.in_features)
            return plain if form == "factors" else plain - rank * rank + rank

        assert size(r) <= (1 - ratio) * p.numel < size(r + 1)
        stored += size(r)
    assert allocation.removed == pytest.approx(1 - stored / sum(p.numel for p in projections))
    assert at_equal_ratio(projections, ratio, Storage(form), ignored=10**6).removed < allocation.removed


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_checkpoint_names_its_method(tiny_model: Path, tmp_path: Path, baseline: str) -> None:
    output, lines = tmp_path / "out", []
    options = CompressOptions(
        str(tiny_model), output, ratio=0.4, baseline=baseline, num_calibration_samples=20, max_seq_length=48
    )
    compress(options, say=lines.append)
    check_output(tiny_model, output)
    section = section_of(output)
    assert section["baseline"] == baseline
    assert section["ratio"]["linear"] == pytest.approx(0.4, abs=0.02)
    assert {row["form"] for row in section["modules"].values()} == {"pivot" if baseline == "pifa" else "factors"}
    assert len(section["modules"]) == 21
    assert any(f"one ratio for every projection, method {baseline}: 21 of 21" in line for line in lines)
    done = run_cli("inspect", output)
    assert f"ranks by {baseline}" in done.stdout
    assert json.loads((output / "pgsvd_report.json").read_text())["modules"][0]["error"] > 0


@pytest.mark.parametrize("other", [{"sensitivity": "measured"}, {"sensitivity": "uniform"}, {"tolerance": 0.1}])
def test_a_baseline_refuses_sensitivity_and_tolerance(
    tiny_model: Path, tmp_path: Path, other: dict[str, object]
) -> None:
    options = CompressOptions(str(tiny_model), tmp_path / "out", baseline="svd", **other)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--baseline: gives every projection the same --ratio"):
        compress(options)
