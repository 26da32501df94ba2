"""Compiled graphs where vLLM compiles layer by layer (piecewise), as on GPUs."""

from pathlib import Path

import pytest

from benchmarks.startup import start
from tests.conftest import run_cli, save_tiny_model
from tests.e2e.checkpoints import truncated, write_checkpoint


@pytest.mark.slow
def test_dense_and_factored_layers_share_graphs(tiny_model: Path, tmp_path: Path) -> None:
    """Ranks differ between the layers; the second layer and the last down projection are dense."""
    done = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "out", "--ratio", "0.2", "--max-seq-length", "64"),
        *("--num-calibration-samples", "32", "--ignore", "model.layers.1.*", "model.layers.2.mlp.down_proj"),
    )
    assert done.returncode == 0, done.stderr
    counts = {}
    for name, folder, load_format in (("dense", tiny_model, "auto"), ("factored", tmp_path / "out", "pgsvd")):
        engine = {"piecewise": True, "max_model_len": 256, "load_format": load_format}
        counts[name] = start(folder, tmp_path / name, **engine)["compiled"]["num_compiled_artifacts_saved"]
    assert counts["factored"] == counts["dense"] > 0


@pytest.mark.slow
def test_one_cache_serves_both_load_formats(tmp_path: Path) -> None:
    """With --load-format pgsvd a dense layer beside factored ones is another graph than without."""
    model = save_tiny_model(tmp_path / "model", layers=2)
    checkpoint = write_checkpoint(model, tmp_path / "out", lambda name, w: None if ".1." in name else truncated(w, 16))
    for load_format in ("pgsvd", "auto"):
        start(checkpoint, tmp_path / "caches", piecewise=True, max_model_len=256, load_format=load_format)
