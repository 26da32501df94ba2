"""docs/reliability.md says what the records in docs/reliability/ hold."""

from pathlib import Path

import pytest

from benchmarks.reliability import record, report
from benchmarks.reliability.record import Record, at_most, figure
from tests.conftest import ROOT


def made(*rows: record.Row) -> Record:
    return {
        "command": "python x.py",
        "date": "2026-11-28",
        "machine": "2 cores",
        "versions": {"a": "1"},
        "rows": [*rows],
    }


def test_the_page_is_made_of_the_records() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.read_records())


def test_every_command_names_a_file_of_the_repository() -> None:
    records = report.read_records()
    assert records
    for found in records.values():
        program, script, *_ = found["command"].split()
        assert program == "python"
        assert (ROOT / script).is_file()


def test_a_record_is_read_back(tmp_path: Path) -> None:
    rows = [figure("seen", 3), at_most("failed", 0, 0), at_most("slow, s", 7.5, 5)]
    record.write(tmp_path / "fuzz.json", "python benchmarks/reliability/fuzz.py", rows)
    found = report.read_records(tmp_path)["fuzz"]
    assert found["rows"] == rows
    assert found["command"].endswith("fuzz.py")
    assert "cores" in found["machine"]
    assert {"python", "torch"} <= found["versions"].keys()


def test_a_missed_bar_is_marked_and_counted() -> None:
    page = report.page({"fuzz": made(figure("inputs", 1_000_000), at_most("failed", 2, 0), at_most("slow, s", 1.5, 5))})
    assert "| damaged files read | 1,000,000 |" in page
    assert "| failed | 2 **MISSED** | 0 |" in page
    assert "| slow, s | 1.5 | 5 |" in page
    assert "| bars missed | 1 |" in page
    assert "    python x.py\n" in page
    assert "2026-11-28, 2 cores; a 1." in page


def test_compressed_and_dense_stand_side_by_side() -> None:
    rows = [at_most("compressed: failed", 0, 0), figure("dense: failed", 3), figure("compressed: alone", 2)]
    lines = report.table([figure("models", 2), *rows], ("compressed", "dense"))
    assert lines[2:5] == ["| models | 2 |  |", "", "| | compressed | dense | bar |"]
    assert lines[6:] == ["| failed | 0 | 3 | 0 |", "| alone | 2 |  |  |"]


def test_outcomes_in_words_are_shown() -> None:
    row: record.Row = {"case": "llama", "value": "written", "bar": "written or refused", "ok": True}
    assert report.table([row])[-1] == "| llama | written | written or refused |"


def test_equal_outcomes_are_counted_and_misses_shown() -> None:
    end = "files that differ from an uninterrupted run"
    rows = [at_most(f"kill {n}: {end}", int(n == 1), 0) for n in range(3)]
    page = report.page({"crash_matrix": made(*rows, figure("cases", 3))})
    assert "2 resumed to the bytes of an uninterrupted run</summary>\n\nkill 0; kill 2\n" in page
    assert f"| kill 1: {end} | 1 **MISSED** | 0 |" in page


def test_a_summary_needs_its_figures() -> None:
    with pytest.raises(LookupError):
        report.page({"fuzz": made(figure("others", 1))})


def test_an_unknown_record_gets_a_section() -> None:
    page = report.page({"power_cuts": made(figure("cuts", 4))})
    assert "## Power cuts\n" in page
    assert "| cuts | 4 |" in page
