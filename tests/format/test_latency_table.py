"""The latency table: interpolation between measured ranks, and invalid files."""

import json
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.latency_table import LatencyTable, ShapeLatencies, read_latencies, write_latencies

FORMS = {"factors": [(16, 10.0), (32, 14.0), (64, 30.0)], "pivot": [(16, 12.0), (48, 20.0)]}
TABLE = LatencyTable(
    {(96, 64): ShapeLatencies(25.0, FORMS), (64, 64): ShapeLatencies(9.5, FORMS)}, 8, "bfloat16", "a machine"
)


def test_a_written_table_reads_back_equal(tmp_path: Path) -> None:
    write_latencies(TABLE, tmp_path / "costs.json")
    assert read_latencies(tmp_path / "costs.json") == TABLE
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    ("form", "rank", "expected"),
    [
        ("factors", 16, 10.0),
        ("factors", 24, 12.0),
        ("factors", 32, 14.0),
        ("factors", 48, 22.0),
        ("factors", 64, 30.0),
        ("factors", 80, 30.0),
        ("factors", 8, 10.0),
        ("pivot", 32, 16.0),
        ("pivot", 56, 20.0),
        ("pivot", None, 25.0),
    ],
)
def test_latencies_are_interpolated_between_measured_ranks(form: str, rank: int | None, expected: float) -> None:
    assert TABLE.latency(96, 64, form, rank) == pytest.approx(expected)


def test_a_shape_without_measurement_is_named() -> None:
    with pytest.raises(InputError, match="no latencies for weights of 64 x 96"):
        TABLE.latency(64, 96, "factors", 16)


def test_a_shape_that_cannot_save_has_a_dense_latency_only(tmp_path: Path) -> None:
    table = LatencyTable({(1, 64): ShapeLatencies(2.0, {"factors": [], "pivot": []})}, 1, "float32", "m")
    write_latencies(table, tmp_path / "costs.json")
    assert read_latencies(tmp_path / "costs.json").latency(1, 64, "pivot", None) == 2.0


def test_a_single_measured_rank_holds_for_all_ranks() -> None:
    costs = ShapeLatencies(9.0, {"factors": [(2, 5.0)], "pivot": []})
    assert [costs.of("factors", rank) for rank in (1, 2, 3)] == [5.0] * 3


def valid() -> dict[str, Any]:
    row = {"out": 96, "in": 64, "dense": 25.0, **{form: [list(p) for p in points] for form, points in FORMS.items()}}
    return {"version": 1, "machine": "m", "tokens": 1, "dtype": "bfloat16", "shapes": [row]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "version 2, this program reads 1"),
        (["tokens"], 0, "0 is not a positive integer"),
        (["tokens"], True, "True is not a positive integer"),
        (["shapes"], None, "not a latency table"),
        (["shapes", 0, "dense"], 0, "0 is not a latency"),
        (["shapes", 0, "dense"], float("nan"), "nan is not a latency"),
        (["shapes", 0, "dense"], "25", "'25' is not a latency"),
        (["shapes", 0, "out"], 1.5, "1.5 is not a positive integer"),
        (["shapes", 0, "dense"], True, "True is not a latency"),
        (["shapes", 0, "dense"], 10**400, "not a latency table"),
        (["shapes", 0, "factors", 1], [16, 14.0], "factors: ranks must ascend"),
        (["shapes", 0, "pivot", 0], [16], "not a latency table"),
        (["shapes", 0, "pivot", 0, 1], float("inf"), "inf is not a latency"),
    ],
)
def test_an_invalid_value_is_named(path: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = valid()
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_latencies(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("key", ["version", "machine", "tokens", "dtype", "shapes"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    content = valid()
    del content[key]
    (tmp_path / "costs.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"costs\.json: not a latency table \(KeyError: '{key}'\)"):
        read_latencies(tmp_path / "costs.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_file_that_is_not_a_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InputError, match=r"`costs` .*costs\.json: (not valid JSON|expected a JSON object)"):
        read_latencies(tmp_path / "costs.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`costs` .*absent\.json: no such file"):
        read_latencies(tmp_path / "absent.json")
