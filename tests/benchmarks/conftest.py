"""All matrices of these tests are small."""

import pytest


@pytest.fixture(autouse=True)
def small_matrices(one_thread: None) -> None:
    """Every test here runs on one thread."""
