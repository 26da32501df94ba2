"""The completion script of bash, run by bash."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pgsvd_vllm.cli import COMMANDS, main


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["compress", "--target-"], {"--target-bytes", "--target-latency", "--target-loss"}),
        (["compress", "MODEL", "--bits", "f"], {"fp8"}),
        (["inspect", "own"], {"own-model"}),
        ([""], set(COMMANDS)),
    ],
)
def test_bash_completes(words: list[str], found: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "own-model").mkdir()
    line = f"COMP_WORDS=(pgsvd-vllm {shlex.join(words)}); COMP_CWORD={len(words)}"
    code = f'source {script}; {line}; _shtab_pgsvd_vllm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == found


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    assert all(name in script.read_text() for name in COMMANDS)
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", script], check=False).returncode == 0
