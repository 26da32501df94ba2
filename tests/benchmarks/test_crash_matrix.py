"""Runs that are killed, in processes of their own: a core of the crash matrix, and all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def rows_of(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    result = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/reliability/crash_matrix.py"), "--json", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    rows: list[dict[str, object]] = json.loads(result.read_text())["rows"]
    assert all(row["ok"] for row in rows)
    return rows


def test_killed_runs_resume_to_equal_bytes(tmp_path: Path) -> None:
    cases = [str(row["case"]) for row in rows_of(tmp_path, "--quick", "kills", "published")]
    assert sum(case.startswith(("kill", "power cut")) for case in cases) == 5
    assert sum("after DIR has appeared" in case for case in cases) == 2


@pytest.mark.slow
def test_the_whole_crash_matrix(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path)) > 150
