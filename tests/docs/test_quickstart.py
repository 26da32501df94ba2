"""The commands of docs/quickstart.md, run in their order by a shell as they stand there.

Only the values of the settings are others: a model of the tests, and a free port. With PGSVD_TIMES=FILE the seconds of
every step are added to a JSON file.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from pgsvd_vllm.cli.evaluate import PROMPTS
from tests.conftest import ROOT, save_tiny_model
from tests.docs.pages import Block, blocks
from tests.support.server import free_port, group_is_alive, stop, tail

PAGE = ROOT / "docs" / "quickstart.md"
# Checked in test_commands.py: what they install is here already.
INSTALL = "Install"
SETTINGS = "Settings"
STEPS = ["Compress", "Inspect", "Serve", "Ask", "Stop", "Evaluate", "Report"]
# Compiling takes vLLM as long as all else together; the slow test does it.
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Walk:
    """A run of the page.

    Attributes:
        folder: in which it ran.
        output: of all commands.
        seconds: step -> its duration.
    """

    folder: Path
    output: str
    seconds: dict[str, float]


def script_of(page: Iterable[Block], settings: dict[str, str], folder: Path) -> str:
    """The page as one script of bash, which notes the time at the end of every step in the file `times`.

    Args:
        page: its blocks.
        settings: name -> value in place of the page's own.
        folder: for the code in Python, which becomes a file.
    """
    lines = ["set -euo pipefail", "echo start $EPOCHREALTIME >> times"]
    for block in page:
        if block.heading == INSTALL:
            continue
        if block.heading == SETTINGS:
            names = [line.removeprefix("export ").partition("=")[0] for line in block.code.splitlines()]
            assert names == list(settings)
            continue
        if block.language == "python":
            (folder / f"{block.heading}.py").write_text(block.code, encoding="utf-8")
            lines.append(f"python {block.heading}.py")
        else:
            assert block.language == "bash"
            lines.append(block.code)
        lines.append(f"echo {block.heading} $EPOCHREALTIME >> times")
    return "\n".join(lines) + "\n"


def walk(model: Path, folder: Path, timeout: float, variables: dict[str, str] | None = None) -> Walk:
    """Run the page in an empty folder with empty caches; all processes have ended when it returns.

    Args:
        model: to compress.
        folder: to work in.
        timeout: in seconds.
        variables: further ones of the environment.
    """
    settings = {"MODEL": str(model), "PORT": str(free_port())}
    script = folder / "page.sh"
    script.write_text(script_of(blocks(PAGE.read_text(encoding="utf-8")), settings, folder), encoding="utf-8")
    here = Path(sys.executable).parent
    environment = {
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        **os.environ,
        **settings,
        **(variables or {}),
        **{"PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")},
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = folder / "page.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", str(script)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout)
        deadline = time.monotonic() + 10
        while group_is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = group_is_alive(process.pid)
    finally:
        stop(process)
    server = folder / "server.log"
    assert status == 0, f"{tail(log)}\n{tail(server) if server.exists() else ''}"
    assert not left, "the page's own commands leave processes of the server"
    times = [line.split() for line in (folder / "times").read_text(encoding="utf-8").splitlines()]
    seconds = {name: float(end) - float(begin) for (_, begin), (name, end) in pairwise(times)}
    return Walk(folder, log.read_text(encoding="utf-8"), seconds)


def note(model: str, seconds: dict[str, float]) -> None:
    """Add the times to the file that PGSVD_TIMES names."""
    name = os.environ.get("PGSVD_TIMES")
    if name:
        path = Path(name)
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        noted[model] = {step: round(value, 1) for step, value in seconds.items()}
        path.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def check(done: Walk) -> None:
    """Whether every step did what the page says."""
    assert list(done.seconds) == STEPS
    assert "wrote small: " in done.output
    assert "serve it:  vllm serve small --load-format pgsvd" in done.output
    assert "all numbers finite" in done.output
    server = (done.folder / "server.log").read_text(encoding="utf-8", errors="replace")
    assert "load_format=pgsvd" in server
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in server
    evaluation = json.loads((done.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["rows"]
    assert all(row["ok"] for row in evaluation["rows"])
    assert [answer["prompt"] for answer in evaluation["answers"]] == list(PROMPTS)
    report = (done.folder / "small" / "report.html").read_text(encoding="utf-8")
    assert all(prompt in report for prompt in PROMPTS)


def test_the_commands_run_on_a_tiny_model(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=1)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (tmp_path / "work").mkdir()
    done = walk(model, tmp_path / "work", 300, NOT_COMPILED)
    note("tiny", done.seconds)
    check(done)


@pytest.mark.slow
def test_the_commands_run_on_smollm2(smollm2: Path, tmp_path: Path) -> None:
    done = walk(smollm2, tmp_path, timeout=3600)
    note("SmolLM2-135M", done.seconds)
    check(done)
    answer = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["answers"][0]
    assert answer["prompt"] == "What is the capital of France?"
    assert "Paris" in answer["compressed"]


def test_a_failing_command_ends_the_walk(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such folder"):
        walk(tmp_path / "absent", tmp_path, timeout=120)
