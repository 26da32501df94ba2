"""Readers refuse a damaged file with one line or find the content it had before; `make fuzz` goes on for longer."""

import json
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.reliability.fuzz import limited
from benchmarks.reliability.row_targets import all_targets
from benchmarks.reliability.targets import Outcome, Target

NAMES = [
    *("config", "config bytes", "index", "index bytes", "header", "header of the first file", "data bits"),
    *("file bytes", "file length", "report", "latency table", "rows of JSON Lines", "bytes of JSON Lines"),
    *("rows of JSON", "rows of CSV", "rows of Parquet", "compressed rows", "plain text", "captions"),
    *("PNG image", "JPEG image"),
]
EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


Targets = Callable[[str], Target]


@pytest.fixture(scope="module")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    targets = {target.name: target for target in all_targets(tmp_path_factory.mktemp("fuzz"))}
    assert list(targets) == NAMES
    return targets.__getitem__


@pytest.mark.parametrize("name", NAMES)
def test_every_target_accepts_its_sample(target_of: Targets, name: str) -> None:
    assert target_of(name).read(target_of(name).sample) in (Outcome.EQUAL, Outcome.READ)


# Fields of a report with which `inspect` once filled the memory: a list as long as a size, and a wide column.
@pytest.mark.parametrize("change", [{"out_features": 2**23, "in_features": [None]}, {"name": "x" * 500_000}])
def test_a_report_of_any_values_takes_little_memory(target_of: Targets, change: dict[str, Any]) -> None:
    report = json.loads(target_of("report").sample)
    rows = [row | change for row in report["modules"] * 8]
    data = json.dumps({"modules": [rows[0], *report["modules"] * 50]} if "name" in change else {"modules": rows})
    tracemalloc.start()
    try:
        target_of("report").read(data.encode())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(random=st.randoms(use_true_random=False))
def test_damage_is_refused_or_changes_nothing(target_of: Targets, name: str, random: Random) -> None:
    target = target_of(name)
    with limited(5):
        assert target.read(target.damage(target.sample, random)) is not Outcome.DIFFERENT


@pytest.mark.parametrize("name", ["config bytes", "index bytes", "file bytes", "report", "latency table"])
@EXAMPLES
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(target_of: Targets, name: str, data: bytes) -> None:
    with limited(5):
        assert target_of(name).read(data) is Outcome.REFUSED
