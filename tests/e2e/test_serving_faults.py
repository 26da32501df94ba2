"""The short form of benchmarks/reliability/serving_faults.py: load, hang-ups, lost files, a killed worker."""

import os
from pathlib import Path

import pytest

from benchmarks.reliability.serving_faults import QUICK, measure


@pytest.mark.slow
def test_a_server_survives_load_and_faults(tiny_model: Path, tiny_compressed: Path, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two tensor-parallel ranks need two cores")
    models = {"dense": tiny_model, "compressed": tiny_compressed}
    rows = measure(models, models, tmp_path, QUICK)
    assert [row for row in rows if not row["ok"]] == []
    assert len([row for row in rows if row["bar"] is not None]) > 15
