"""The report of many sizes and methods: quality against size, with the front."""

from collections.abc import Mapping, Sequence
from typing import Any

from pgsvd_vllm.report.charts import Series, lines
from pgsvd_vllm.report.page import Cell, Section, number, render

# Multiples of the dense perplexity beyond which a method is left out of the charts, which it would flatten.
MOST = 20.0


def front_of(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """The indices of the rows that no other row beats in both bytes and perplexity."""

    def beaten(one: Mapping[str, Any]) -> bool:
        return any(
            other["bytes"] <= one["bytes"]
            and other["multiple"] <= one["multiple"]
            and (other["bytes"], other["multiple"]) != (one["bytes"], one["multiple"])
            for other in rows
            if other.get("multiple") is not None
        )

    return {n for n, row in enumerate(rows) if row.get("multiple") is not None and not beaten(row)}


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float = 1.0) -> list[Series]:
    """One line a method, with the points of the front marked."""
    front = front_of(rows) if y == "multiple" else set()
    found = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = [
            (row[x] * scale, row[y], _note(row), n in front)
            for n, row in enumerate(rows)
            if row["method"] == method and row.get(y) is not None and (y != "multiple" or row[y] <= MOST)
        ]
        own.sort()
        if own:
            points, notes = [one[:2] for one in own], [one[2] for one in own]
            found.append(Series(method, points, notes, marked=[n for n, one in enumerate(own) if one[3]]))
    return found


def _note(row: Mapping[str, Any]) -> str:
    parts = [f"{row['method']}, {row['removed']:.0%} removed, {row['bytes'] / 1e6:.0f} MB"]
    if row.get("multiple") is not None:
        parts.append(f"perplexity {row['multiple']:.3f} x dense")
    return ": ".join(parts)


def sweep_charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The charts of a sweep as SVG: `removed`, `bytes`, `time` and `predicted`, the last two where they are known.

    Args:
        rows: of pareto.json.
    """
    multiple, removed = "perplexity, multiple of dense", "parameters of the projections removed"
    charts = {
        "removed": lines(_series(rows, "removed", "multiple"), (removed, multiple), True),
        "bytes": lines(_series(rows, "bytes", "multiple", 1e-6), ("size, MB", multiple), True, percent=False),
    }
    timed = [row for row in rows if row.get("gemm_time") is not None]
    if timed:
        charts["time"] = lines(_series(timed, "gemm_time", "multiple"), ("GEMM time, share of dense", multiple), True)
    predicted = _series(rows, "removed", "predicted")
    if predicted:
        charts["predicted"] = lines(predicted, (removed, "predicted loss, nats per token"), True)
    return charts


def sweep_report(
    title: str, facts: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]], charts: Mapping[str, str]
) -> str:
    """The HTML page of a sweep.

    Args:
        title: of the page.
        facts: rows of name and value at its top.
        rows: of pareto.json.
        charts: as of `sweep_charts`.
    """
    front = front_of(rows)
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks") or {}))
    head = ("method", "removed", "MB", "perplexity", "x dense", "GEMM time", "predicted nats", *tasks, "on the front")
    table = [
        [
            Cell(str(row["method"])),
            Cell(f"{row['removed']:.1%}", row["removed"]),
            Cell(f"{row['bytes'] / 1e6:.1f}", row["bytes"]),
            number(row.get("perplexity"), "{:.3f}"),
            number(row.get("multiple"), "{:.3f}"),
            number(row.get("gemm_time"), "{:.1%}"),
            number(row.get("predicted"), "{:.4f}"),
            *(number((row.get("tasks") or {}).get(task), "{:.1%}") for task in tasks),
            Cell("yes" if n in front else "", float(n in front)),
        ]
        for n, row in enumerate(rows)
    ]
    above = sorted({str(row["method"]) for row in rows if (row.get("multiple") or 0) > MOST})
    left = f"Points above {MOST:.0f} times dense are in the table alone ({', '.join(above)})." if above else ""
    marks = "Large points are on the front: nothing measured is both smaller and better. "
    sections = [
        Section("Quality by removed parameters", marks + left, svg=charts["removed"]),
        Section("Quality by size", svg=charts["bytes"]),
    ]
    if "time" in charts:
        sections.append(Section("Quality by GEMM time", "By the latency table.", svg=charts["time"]))
    if "predicted" in charts:
        sections.append(
            Section("Predicted loss", "From calibration alone, which ranks are chosen by.", svg=charts["predicted"])
        )
    sections.append(Section("All points", head=head, rows=table, sortable=True))
    return render(title, facts, sections)
