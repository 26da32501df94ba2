"""Checks that a command fails with exit status 2 and one error line that names the fault, and leaves no files."""

from pathlib import Path

import pytest

from pgsvd_vllm.cli import main

PREFIX = "pgsvd-vllm: error: "
FAST = ["--num-calibration-samples", "16", "--max-seq-length", "64"]


def the_line(code: int, errors: str) -> str:
    """The error line, which must be the only one and the last line."""
    assert code == 2, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, errors
    assert errors.splitlines()[-1] == lines[0], "output follows the error line"
    return lines[0]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(folder)), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


class Refusal:
    """Runs `compress` in this process, which must fail with an error that contains all `culprits`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        self.capsys = capsys
        self.folder = tmp_path / "outputs"
        self.folder.mkdir()

    def __call__(self, model: object, *options: object, culprits: tuple[str, ...]) -> str:
        before = listing(self.folder)
        self.capsys.readouterr()
        arguments = ["compress", model, "-o", self.folder / "out", *FAST, *options]
        line = the_line(main([str(a) for a in arguments]), self.capsys.readouterr().err)
        for culprit in culprits:
            assert culprit in line
        assert listing(self.folder) == before
        return line
