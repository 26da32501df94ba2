"""The record of a reliability run, kept in docs/reliability/: its rows, command, machine and versions.

docs/reliability.md is generated from these files by report.py.
"""

import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

RECORDS = Path(__file__).resolve().parent.parent.parent / "docs" / "reliability"
PACKAGES = ("pgsvd-vllm", "torch", "transformers", "safetensors", "vllm")


class Row(TypedDict):
    """One figure of a run.

    Attributes:
        case: says what was done or measured, with its unit.
        value: the figure, or the outcome in words.
        bar: largest value that passes, or the outcome that does, in words; None for a figure without one.
        ok: whether the value passes.
    """

    case: str
    value: float | str
    bar: float | str | None
    ok: bool


class Record(TypedDict):
    """One run: `rows`, the `command` that repeats it, and where and when it ran."""

    command: str
    date: str
    machine: str
    versions: dict[str, str]
    rows: list[Row]


def at_most(case: str, value: float, bar: float) -> Row:
    """A row whose value may not exceed its bar."""
    return {"case": case, "value": value, "bar": bar, "ok": value <= bar}


def figure(case: str, value: float | str) -> Row:
    """A row without a bar."""
    return {"case": case, "value": value, "bar": None, "ok": True}


def machine() -> str:
    """The processor and the number of cores of this process."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.machine()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="ascii", errors="replace").splitlines() if path.is_file() else []


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def make(command: str, rows: Sequence[Row]) -> Record:
    """The record of a run on this machine, today.

    Args:
        command: that repeats it, from the repository's root.
        rows: of the run.
    """
    return {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": _versions(),
        "rows": list(rows),
    }


def write(path: Path, command: str, rows: Sequence[Row]) -> None:
    """Write the record of a run on this machine, today; see `make`."""
    path.write_text(json.dumps(make(command, rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(rows: Sequence[Row]) -> None:
    """Print one line per row."""
    for row in rows:
        value, bar = (f"{x:.6g}" if isinstance(x, int | float) else x for x in (row["value"], row["bar"]))
        print(f"{row['case']:78} {value:>12}" + ("" if bar is None else f"  bar {bar} {_verdict(row)}"), flush=True)


def _verdict(row: Row) -> str:
    return "ok" if row["ok"] else "MISSED"
