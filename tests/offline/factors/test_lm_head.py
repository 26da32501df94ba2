"""Calibration and factors of the LM head against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.calibration.lm_head import (
    FLOOR,
    HeadSums,
    head_batches,
    lm_head_calibration,
    row_scale,
    run_lm_head,
)
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.executor.executor import combined
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.find_projections import find_lm_head
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("untied") / "model", tie=False)


def inputs_and_predictions(folder: Path, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [tokens, in] and probabilities [tokens, vocabulary] of the LM head in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.flatten(0, 1)
        return hidden.numpy(), model.lm_head(hidden).softmax(-1).numpy()


def power_of_two(stored: np.ndarray, exact: np.ndarray) -> float:
    """The power of two by which a stored array differs from its definition."""
    return 2.0 ** round(float(np.log2(np.linalg.norm(stored) / np.linalg.norm(exact))))


def test_lm_head_moments_equal_those_of_the_whole_model(untied: Path) -> None:
    ids = torch.randint(2, 258, (5, 40), generator=torch.Generator().manual_seed(0))
    source = ModelSource(untied)
    stream = LayerStream(source, text_batches(ids), CPU, torch.float32)
    with torch.no_grad():
        for index in range(len(source.layers)):
            with source.layer(index, CPU, torch.float32) as layer:
                stream.flow.hidden = [stream.run(layer, index, n, h) for n, h in enumerate(stream.flow.hidden)]
            stream.leave(index, stream.flow)
    head = find_lm_head(source)
    *_, sums = combined([run_lm_head(stream, head, head_batches(text_batches(ids)))], HeadSums())
    assert isinstance(sums, HeadSums)
    found = lm_head_calibration(source, head, sums)
    x, p = inputs_and_predictions(untied, ids)
    unit = power_of_two(found.gram.numpy(), x.T @ x)
    np.testing.assert_allclose(found.gram.numpy() / unit, x.T @ x, rtol=1e-3, atol=1e-2)
    weight = (p * (1 - p)).mean(0)
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-3)
    scale = np.sqrt(np.maximum(weight, FLOOR * weight.mean()))
    row_unit = power_of_two(row_scale(found.weight).numpy(), scale)
    np.testing.assert_allclose(row_scale(found.weight)[:, 0].numpy() / row_unit, scale, rtol=1e-3)
    singular = np.linalg.svd(
        scale[:, None] * source.weights.tensor("lm_head.weight").double().numpy() @ x.T, compute_uv=False
    )
    energy = found.energy.numpy() / (unit * row_unit**2)
    np.testing.assert_allclose(energy, singular[:128] ** 2, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_the_rank_is_the_smallest_within_the_tolerance(
    untied: Path, tolerance: float, tmp_path: Path, one_thread: None
) -> None:
    few = {"num_calibration_samples": 32, "max_seq_length": 64}
    options = CompressOptions(
        str(untied), tmp_path / "out", ratio=0.2, include=("lm_head",), head_tolerance=tolerance, **few
    )
    report = next(row for row in compress(options).modules if row.name == "lm_head")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (report.rank is None) == (tolerance == 0.1)
    if report.rank is None:
        assert "lm_head" not in checkpoint.modules
        assert checkpoint.tensors["lm_head.weight"].shape == (258, 128)
        return
    assert checkpoint.modules["lm_head"].rank == report.rank
    # In float32 and without rounding of the rank the error equals the optimum.
    assert report.error == pytest.approx(report.optimum, rel=1e-3)
    assert report.error <= tolerance
    assert report.error > tolerance - 0.05
