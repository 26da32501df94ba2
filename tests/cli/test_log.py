"""--quiet and --log-format json, on real runs."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

CODE = "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"
FEW = ["--ratio", "0.3", "--num-calibration-samples", "20", "--max-seq-length", "48", "--dataset", "python-docs"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(datetime.fromisoformat(one.pop("time")).tzinfo is not None for one in found)
    return found


@pytest.fixture(scope="module")
def logged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    output = tmp_path_factory.mktemp("log") / "out"
    return run("compress", tiny_model, "-o", output, *FEW, "--refine", "2k", "--log-format", "json")


def test_every_line_is_an_object(logged: subprocess.CompletedProcess[str]) -> None:
    assert logged.returncode == 0, logged.stderr
    lines = objects(logged.stdout)
    assert {one["level"] for one in lines} <= {"info", "warning"}
    assert any(one["message"].startswith("wrote ") for one in lines)
    assert lines[-1]["message"].startswith("serve it:  vllm serve ")


def test_progress_has_numbers(logged: subprocess.CompletedProcess[str]) -> None:
    bars = [one for one in objects(logged.stderr) if one["level"] == "progress"]
    ends = {one["stage"]: (one["done"], one["total"]) for one in bars}
    assert {"calibrate", "factorize", "refine"} <= set(ends)
    assert all(done == total for stage, (done, total) in ends.items() if stage in ("calibrate", "factorize", "refine"))
    assert all(isinstance(one["seconds"], int | float) for one in bars)


def test_an_error_is_an_object(tmp_path: Path) -> None:
    done = run("compress", tmp_path / "absent", "-o", tmp_path / "out", "--log-format", "json")
    assert done.returncode == 2
    (error,) = objects(done.stderr)
    assert error["level"] == "error"
    assert error["message"].startswith(f"MODEL {tmp_path / 'absent'}: no such folder")


def test_nested_bars_and_warnings_of_python_are_objects() -> None:
    code = """
import argparse, sys, warnings
from pgsvd_vllm.cli.log import output_streams
sys.stdout, sys.stderr = output_streams(argparse.Namespace(log_format="json"))
from tqdm.auto import tqdm
for _ in tqdm(range(2), desc="outer", mininterval=0):
    for _ in tqdm(range(2), desc="inner", mininterval=0, leave=False):
        pass
warnings.warn("mind this")
print("WARNING: first\\nsecond", file=sys.stderr)
print("no end", end="", file=sys.stderr)
sys.stderr.end()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    found = objects(done.stderr)
    bars = [one for one in found if one["level"] == "progress"]
    assert {(one["stage"], one["done"], one["total"]) for one in bars} >= {("outer", 2, 2), ("inner", 1, 2)}
    lines = [(one["level"], one["message"]) for one in found if one["level"] != "progress"]
    assert lines[0][0] == "warning"
    assert "UserWarning: mind this" in lines[0][1]
    assert lines[-3:] == [("warning", "first"), ("warning", "second"), ("info", "no end")]


def test_tasks_of_evaluate_are_logged_as_objects(tiny_model: Path, tmp_path: Path) -> None:
    """lm_eval runs in a process of its own."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    task = tmp_path / "quiz.jsonl"
    task.write_text('{"query": "One and one", "choices": ["two", "three"], "gold": 0}\n' * 4)
    given = ["--tasks", task, "--backend", "hf", "--num-samples", "0", "--no-answers", "--log-format", "json"]
    done = run("evaluate", tiny_model, *given)
    assert done.returncode == 0, done.stderr
    assert any(one["message"].startswith("quiz, acc") for one in objects(done.stdout))
    assert any(one["level"] == "progress" for one in objects(done.stderr))


def test_quiet_keeps_warnings(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("".join(f"Line {i} of {i * i} things.\n" for i in range(52)), encoding="utf-8")
    small = ["--dataset", text, "--num-calibration-samples", "20", "--max-seq-length", "48"]
    done = run("compress", tiny_model, "-o", tmp_path / "out", "--ratio", "0.3", *small, "-q")
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING: ")]
    assert any("no distillation: the text has fewer than" in line for line in warnings)


def test_quiet_leaves_results_warnings_and_errors(tiny_model: Path, tmp_path: Path) -> None:
    done = run("compress", tiny_model, "-o", tmp_path / "out", *FEW, "--refine", "0", "--quiet")
    assert done.returncode == 0, done.stderr
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["wrote", "report:", "serve"]
    assert done.stderr == ""
    done = run("compress", tiny_model, "-o", tmp_path / "out", *FEW, "-q")
    assert done.stderr.startswith("pgsvd-vllm: error: --output-dir")


def test_quiet_keeps_the_plan_of_a_dry_run(tiny_model: Path, tmp_path: Path) -> None:
    done = run("compress", tiny_model, "-o", tmp_path / "out", *FEW, "-q", "--dry-run")
    assert "needs about:" in done.stdout
    assert "calibration: 20 windows" in done.stdout
    assert done.stderr == ""
