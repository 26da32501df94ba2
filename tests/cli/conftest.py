"""All matrices of these tests are small; commands that must refuse."""

from pathlib import Path

import pytest

from tests.cli.refusal import Refusal


@pytest.fixture(autouse=True)
def small_matrices(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    """Runs `compress` and checks how it refuses."""
    return Refusal(capsys, tmp_path)
