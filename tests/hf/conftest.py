"""Fixtures of the tests of hf: their matrices are small."""

import pytest


@pytest.fixture(autouse=True)
def small_matrices(one_thread: None) -> None:
    """Run every test of this folder on one thread."""
