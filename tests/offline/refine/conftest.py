"""Shared by the tests of distillation."""

import pytest

from pgsvd_vllm.offline.refine import distill


@pytest.fixture(autouse=True)
def one_window_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of these tests are short."""
    monkeypatch.setattr(distill, "STEP_TOKENS", 1)
