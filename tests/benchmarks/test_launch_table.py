"""The table of launch times, as far as it does not depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed")


def test_layers_make_no_more_calls_to_torch(tmp_path: Path) -> None:
    """Outside of CUDA graphs every call costs the CPU time that the GPU waits for."""
    script, result = ROOT / "benchmarks/launch_table.py", tmp_path / "rows.json"
    command = [sys.executable, str(script), "--host", "--quick", "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["case"]: row["value"] for row in json.loads(result.read_text(encoding="utf-8"))}
    calls = {case: value for case, value in rows.items() if case.endswith("calls")}
    assert len(calls) == 8
    # Down, three up, the outputs, and two splits; one GEMM after the other.
    assert (calls["qkv, factors, calls"], calls["o, factors, calls"]) == (7, 2)
    assert rows["decoder layer, factors, us"] > rows["mm, us"] > 0
