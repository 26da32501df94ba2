"""Fixtures of the tests of cli: one thread for small matrices, and a check of refused commands."""

from pathlib import Path

import pytest

from tests.cli.refusal import Refusal


@pytest.fixture(autouse=True)
def small_matrices(one_thread: None) -> None:
    """Run every test of this folder on one thread."""


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    """Runs `compress`, which must fail with one error line and leave no files."""
    return Refusal(capsys, tmp_path)
