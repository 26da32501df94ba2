"""docs/reliability.md, generated from the records in docs/reliability/.

    python benchmarks/reliability/report.py [--write]

Without --write it only says whether the page is up to date; a test does the same.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.reliability.record import RECORDS, Record, Row

PAGE = RECORDS.parent / "reliability.md"
INTRODUCTION = """# Reliability

Damaged inputs, interrupted runs and servers under faults: what was tried, how often, and what failed. Every figure is
in the folder `docs/reliability/` with its command, machine and versions; `python benchmarks/reliability/report.py
--write` makes this page of them. A bar is the largest value that passes; **MISSED** marks a value above it. Every
command ends with status 1 where a bar is missed.
"""
# Name of a record -> title and text of its section, in the page's order. Others follow under their names.
SECTIONS = {
    "fuzz": (
        "Damaged files",
        """One file of a checkpoint or of calibration data is damaged at random: bits, bytes and lengths, JSON values,
        the entries of safetensors headers. A reader must refuse it with one printable line, or find the content that
        it had before. Calibration files and latency tables have no checksum: the lines of their documents must stand
        in the file. `make fuzz` goes on for longer, guided by coverage (atheris); `tests/fuzz/` has a short form.""",
    ),
    "crash_matrix": (
        "Interrupted runs of `compress`",
        """Runs are killed, lose their disk space or permissions, or find work files and inputs changed. Each must
        resume to the bytes of an uninterrupted run, or end in one line that says what to do.""",
    ),
    "bit_rot": ("Bit rot", "Bits of tensor data are flipped; `verify` must name the file."),
    "serving_faults": (
        "Serving under faults",
        """`vllm serve` with a compressed model and, as a reference without bars, with the dense one. Memory is resident
        memory of all processes of the server.""",
    ),
    "architectures": (
        "Architectures",
        """A tiny random model of every causal language model of transformers is compressed, verified and run, or
        refused with a reason.""",
    ),
}
# Name of a record -> what stands before ": " in cases that share a line of a table.
COLUMNS = {"serving_faults": ("compressed", "dense"), "fuzz": ("inputs", "refused")}
# Name of a record -> (end of `case: value`, what it says): cases that differ in their name alone are counted and named.
ALIKE = {
    "crash_matrix": (
        (": files that differ from an uninterrupted run: 0", "resumed to the bytes of an uninterrupted run"),
        (": refused in one line; deviations: 0", "ended in one line that says what to do"),
    ),
    "architectures": ((" projections factored", "written, verified, and run by transformers"),),
}
WIDTH = 120
# Characters of an outcome in words; the record has all of it.
LONGEST_OUTCOME = 160


def number(value: float | str) -> str:
    """A figure, or an outcome in words, as the page shows it."""
    if isinstance(value, str):
        return textwrap.shorten(value, LONGEST_OUTCOME, placeholder=" ...")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def limit(bar: float | str | None) -> str:
    """A bar as the page shows it."""
    return "" if bar is None else number(bar)


def shown(row: Row | None) -> str:
    """The value of a row; a missed bar is marked."""
    return "" if row is None else f"{number(row['value'])}{'' if row['ok'] else ' **MISSED**'}"


def table(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[str]:
    """Rows as a table of lines, then those whose cases begin with the name of a column as a table with these columns.

    Args:
        rows: of a record.
        columns: what stands before ": " in a case.
    """
    lines: list[str] = []
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        name, _, case = row["case"].partition(": ")
        if case and name in columns:
            cases.setdefault(case, {})[name] = row
        else:
            lines.append(f"| {row['case']} | {shown(row)} | {limit(row['bar'])} |")
    if lines:
        lines = ["| | | bar |", "|---|---|---|", *lines]
    if cases:
        lines += [""] * bool(lines) + [f"| | {' | '.join(columns)} | bar |", f"|---|{'---|' * len(columns)}---|"]
    for case, found in cases.items():
        bars = [limit(row["bar"]) for row in found.values() if row["bar"] is not None]
        values = " | ".join(shown(found.get(name)) for name in columns)
        lines.append(f"| {case} | {values} | {bars[0] if bars else ''} |")
    return lines


def alike(rows: Sequence[Row], ends: Sequence[tuple[str, str]]) -> tuple[list[str], list[Row]]:
    """Paragraphs that count and name the cases of equal outcomes, and the other rows.

    Args:
        rows: of a record.
        ends: as in `ALIKE`.
    """
    lines: list[str] = []
    rest = list(rows)
    for end, meaning in ends:
        found = [row for row in rest if row["ok"] and f"{row['case']}: {number(row['value'])}".endswith(end)]
        rest = [row for row in rest if row not in found]
        # The outcome is part of the case or of the value.
        names = [row["case"].removesuffix(end.rpartition(": ")[0]) for row in found]
        summary = f"<details><summary>{len(found)} {meaning}</summary>"
        lines += [summary, "", textwrap.fill("; ".join(names), WIDTH), "", "</details>", ""]
    return lines, rest


def total(record: Record, case: str) -> float | str:
    """The value of the row with this case.

    Raises:
        LookupError: the record has no such row.
    """
    return {row["case"]: row["value"] for row in record["rows"]}[case]


def failures(record: Record) -> int:
    """Rows whose bar is missed."""
    return sum(not row["ok"] for row in record["rows"])


# Name of a record -> lines of the summary: what, and the figure.
SUMMARY: dict[str, Callable[[Record], list[tuple[str, float | str]]]] = {
    "fuzz": lambda record: [("damaged files read", total(record, "inputs"))],
    "crash_matrix": lambda record: [("faults that runs of `compress` survived", total(record, "cases"))],
    "serving_faults": lambda record: [
        ("requests served by a compressed model", total(record, "compressed: requests of mixed lengths")),
        ("of them failed", total(record, "compressed: requests that failed")),
        (
            "growth of its memory over the last three quarters of them, MiB",
            total(record, "compressed: growth of memory, MiB"),
        ),
        ("the same of the dense model, MiB", total(record, "dense: growth of memory, MiB")),
    ],
}


def section(name: str, record: Record) -> list[str]:
    """One record as a section."""
    title, text = SECTIONS.get(name, (name.replace("_", " ").capitalize(), ""))
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    place = textwrap.fill(f"{record['date']}, {record['machine']}; {versions}.", WIDTH)
    where = [f"    {record['command']}", "", place, ""]
    paragraphs, rest = alike(record["rows"], ALIKE.get(name, ()))
    return [
        f"## {title}",
        "",
        *([textwrap.fill(" ".join(text.split()), WIDTH), ""] if text else []),
        *where,
        *table(rest, COLUMNS.get(name, ())),
        "",
        *paragraphs,
    ]


def page(records: dict[str, Record]) -> str:
    """The page.

    Args:
        records: name -> record.
    """
    names = [*(name for name in SECTIONS if name in records), *sorted(set(records) - set(SECTIONS))]
    lines = [INTRODUCTION, "| | |", "|---|---|"]
    for name in names:
        if name in SUMMARY:
            lines += [f"| {what} | {number(value)} |" for what, value in SUMMARY[name](records[name])]
    lines += [f"| bars missed | {sum(failures(record) for record in records.values())} |", ""]
    for name in names:
        lines += section(name, records[name])
    return "\n".join(lines).rstrip() + "\n"


def read_records(folder: Path = RECORDS) -> dict[str, Record]:
    """Name -> record, of all records of a folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main() -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    arguments = parser.parse_args()
    text = page(read_records())
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    print("docs/reliability.md is up to date" if same else "docs/reliability.md: run report.py --write")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
