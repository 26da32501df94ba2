"""The report of a study: the claims of the PGSVD paper on one model, a table and a chart for each question."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgsvd_vllm.report.charts import Series, grouped_bars, lines
from pgsvd_vllm.report.page import Cell, Section, number, render

Rows = Sequence[Mapping[str, Any]]
MULTIPLE = "multiple of the front"
# Series whose values are shares, and how they are shown.
SHARES = {
    "distance of the removed share": "{:.2%}",
    "mean excess error": "{:.2%}",
    "worst excess error": "{:.2%}",
    "error at half rank": "{:.1%}",
    "error at the optimum": "{:.1%}",
    "kept at the optimum": "{:.1%}",
    "removed share": "{:.1%}",
}


@dataclass(frozen=True)
class Question:
    """How a question is shown.

    Attributes:
        title: of its section.
        text: below the title.
        head: of the table's first column, and the label of a line chart's x axis.
        label: of the chart's y axis; the x axis of bars.
        log: whether a line chart's y axis is logarithmic.
        percent: whether the first column is a share.
    """

    title: str
    text: str
    head: str
    label: str
    log: bool = False
    percent: bool = False


REMOVED = "parameters of the projections removed"
SHOWN = {
    "front": Question(
        "Is one uniform tolerance on the Pareto front?",
        "The loss of one tolerance for all projections, as a multiple of the least loss of any ranks of that size; 1 "
        "is the front. By the paper's surrogate, the sum of squared relative errors, and by the loss that gradients "
        "predict. In plain factors.",
        REMOVED,
        MULTIPLE,
        percent=True,
    ),
    "solver": Question(
        "How close is alternating least squares to the exact solution?",
        "Relative excess of the output error of ALS, started from a plain SVD, over the smallest possible one. Ranks "
        "are those of one tolerance.",
        "sweeps",
        "excess error",
        log=True,
    ),
    "sensitivity": Question(
        "How much do attention and feed-forward projections matter?",
        "Nats are the predicted loss of a relative output error of 10 %: in one projection (chart and mean), or in all "
        "of a kind at once. The optimum has the least predicted loss of all ranks of the size.",
        "layer",
        "nats for an error of 10 %",
        log=True,
    ),
    "ablation": Question(
        "What do ranks bring, and what the solver?",
        "Models of one size, in plain factors, factored in one step without distillation. Both solvers minimise the "
        "error of the dense model's outputs; measured losses only choose the ranks.",
        "ranks by",
        "perplexity, multiple of dense",
    ),
    "sharing": Question(
        "Should projections of one input share a down factor?",
        "Predicted loss where q, k and v, or gate and up, have one down factor, as a multiple of that with one each. "
        "Both have the best ranks of the size.",
        REMOVED,
        "multiple of apart",
        percent=True,
    ),
    "forward": Question(
        "How much do ranks lose without gradients?",
        "Predicted loss of the ranks that forward passes alone choose (compress --sensitivity forward), as a multiple "
        "of the front's, in the pivot form.",
        REMOVED,
        MULTIPLE,
        percent=True,
    ),
    "time": Question(
        "How long does each stage take?",
        "Seconds in the run that did the stage. A stage that this folder held already, in part or as a whole, is "
        "resumed.",
        "stage",
        "seconds",
    ),
}


def study_report(title: str, facts: Sequence[tuple[str, str]], rows: Rows, ratio: float) -> str:
    """The HTML page of a study.

    Args:
        title: of the page.
        facts: rows of name and value at its top.
        rows: of study.json.
        ratio: removed share of the questions that have one.
    """
    by_question = {name: [row for row in rows if row["question"] == name] for name in SHOWN}
    answers = [[Cell(name), Cell(FINDINGS[name](own, ratio), is_text=True)] for name, own in by_question.items() if own]
    sections = [Section("Findings", head=("question", "measured on this model"), rows=answers)]
    barred = [row for row in rows if row.get("bar") is not None]
    if barred:
        table = [
            [
                Cell(f"{row['question']}: {row['case']}"),
                number(row["value"], "{:.3g}"),
                Cell(f"{row['bar']:g}"),
                Cell("ok" if row["ok"] else "MISSED"),
            ]
            for row in barred
        ]
        sections.append(Section("Bars", "A value must not exceed its bar.", head=("", "value", "bar", ""), rows=table))
    sections += [_section(SHOWN[name], own) for name, own in by_question.items() if own]
    return render(title, facts, sections)


def _section(shown: Question, rows: Rows) -> Section:
    """The chart and the table of a question; rows with names as places are in the table, those with numbers on axes."""
    named = [row for row in rows if isinstance(row["at"], str)]
    placed = [row for row in rows if row["at"] is not None and not isinstance(row["at"], str)]
    svg = _lines(shown, placed) if placed else _bars(shown, named)
    head, table = _table(shown, named or placed)
    head[0] = "projection" if named and placed else head[0]
    return Section(shown.title, shown.text, svg=svg, head=head, rows=table)


def _lines(shown: Question, rows: Rows) -> str:
    """A line for each series; values with bars, and on a logarithmic axis those that are not positive, are left out."""
    drawn = [row for row in rows if row.get("bar") is None and row["value"] is not None]
    drawn = [row for row in drawn if row["value"] > 0 or not shown.log]
    series = []
    for name in dict.fromkeys(row["series"] for row in drawn):
        own = [row for row in drawn if row["series"] == name]
        points = [(float(row["at"]), float(row["value"])) for row in own]
        series.append(Series(name, points, [f"{row['case']}: {_text(row)}" for row in own]))
    return lines(series, (shown.head, shown.label), log=shown.log, percent=shown.percent) if series else ""


def _bars(shown: Question, rows: Rows) -> str:
    """A bar for each value that is no share."""
    drawn = [row for row in rows if row["value"] is not None and row["series"] not in SHARES]
    if not drawn:
        return ""
    values = [row["value"] for row in drawn]
    wide = min(values) > 0 and max(values) > 10 * min(values) and shown.head != "stage"
    return grouped_bars([(row["at"], row["series"], row["value"]) for row in drawn], shown.label, log=wide)


def _table(shown: Question, rows: Rows) -> tuple[list[str], list[list[Cell]]]:
    """The names of the columns, and a line for each place with a column for each series."""
    columns = list(dict.fromkeys(row["series"] for row in rows))
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["at"], {})[row["series"]] = row
    table = [
        [
            Cell(f"{at:.0%}" if shown.percent else f"{at}"),
            *(Cell("-" if name not in own else _text(own[name])) for name in columns),
        ]
        for at, own in found.items()
    ]
    return [shown.head, *columns], table


def _text(row: Mapping[str, Any]) -> str:
    """A value as it is shown."""
    value = row["value"]
    if row["series"] == "resumed":
        return "all of it" if value is None else f"{value:.4g} for the rest"
    return "-" if value is None else SHARES.get(row["series"], "{:.4g}").format(value)


def _values(rows: Rows, ratio: float) -> dict[str, float]:
    """Series -> its value at the place that is closest to a removed share; series without values are left out."""
    known = [row for row in rows if row["value"] is not None]
    closest = sorted(known, key=lambda row: -abs(row["at"] - ratio))
    return {row["series"]: row["value"] for row in closest}


def _at(rows: Rows, ratio: float) -> str:
    return f"At {min((row['at'] for row in rows), key=lambda at: abs(at - ratio)):.0%} removed"


def _front(rows: Rows, ratio: float) -> str:
    values = _values([row for row in rows if row.get("bar") is None], ratio)
    parts = [f"{value:.2f} times the front's {series}" for series, value in values.items()]
    return f"{_at(rows, ratio)} one tolerance costs {' and '.join(parts) or 'an unknown multiple'}."


def _solver(rows: Rows, _ratio: float) -> str:
    mean = {row["at"]: row["value"] for row in rows if row["series"] == "mean excess error"}
    (most, last), (first, start) = max(mean.items()), min(mean.items())
    sweep = "sweep" if first == 1 else "sweeps"
    exact, als = (row["value"] for row in rows if row["case"].endswith(", seconds"))
    return (
        f"ALS has {start:.2%} more error than the exact solution after {first} {sweep} and {last:.2%} after {most}, on "
        f"average. {most} sweeps take {als:.3g} s, {als / exact:.2f} times the {exact:.3g} s of the exact solution."
    )


def _sensitivity(rows: Rows, _ratio: float) -> str:
    means = {row["at"]: row["value"] for row in rows if row["series"] == "mean nats"}
    most, least = max(means, key=lambda kind: means[kind]), min(means, key=lambda kind: means[kind])
    parts: dict[str, float] = {}
    for row in rows:
        if row["series"] == "total nats":
            part = row["at"].rpartition(".")[0] or row["at"]
            parts[part] = parts.get(part, 0.0) + row["value"]
    whole = ", ".join(f"{part} {value:.4f}" for part, value in parts.items())
    return (
        f"An output error of 10 % costs most in {most} ({1e3 * means[most]:.3g} milli-nats on average) and least in "
        f"{least} ({1e3 * means[least]:.3g}). An error of 10 % in all at once costs, in nats: {whole}."
    )


def _ablation(rows: Rows, ratio: float) -> str:
    values = [row for row in rows if isinstance(row["at"], str) and row["series"] not in SHARES]
    values = [row for row in values if row["value"] is not None]
    if not values:
        return "No model could be measured."
    best = min(values, key=lambda row: row["value"])

    def apart(key: str, fixed: str) -> float:
        """The largest quotient of two values that differ in `key` alone."""
        groups = [[row["value"] for row in values if row[fixed] == place] for place in {row[fixed] for row in values}]
        return max(max(group) / min(group) for group in groups)

    return (
        f"At {ratio:.0%} removed, ranks by {best['at']} with {best['series']} lose least: {best['value']:.3f} times "
        f"the dense perplexity. Rules for ranks are up to {apart('at', 'series'):.3f} times apart, solvers up to "
        f"{apart('series', 'at'):.3f} times."
    )


def _sharing(rows: Rows, ratio: float) -> str:
    placed = [row for row in rows if row["at"] is not None]
    if not placed:
        return "No two projections of this model share an input."
    parts = [f"{value:.2f} times ({series})" for series, value in _values(placed, ratio).items()]
    return f"{_at(placed, ratio)} one down factor a group costs {' and '.join(parts)} the predicted loss of one each."


def _forward(rows: Rows, ratio: float) -> str:
    (value,) = _values(rows, ratio).values() or (None,)
    times = "an unknown multiple of" if value is None else f"{value:.2f} times"
    return f"{_at(rows, ratio)} ranks from forward passes cost {times} the front's predicted loss."


def _time(rows: Rows, _ratio: float) -> str:
    known = [f"{row['at']} {row['value']:.3g} s" for row in rows if row["value"] is not None and row["value"] >= 1]
    resumed = [row["at"] for row in rows if row["series"] == "resumed"]
    return (
        ("; ".join(known) or "No stage took a second") + (f". Resumed: {', '.join(resumed)}" if resumed else "") + "."
    )


FINDINGS: dict[str, Callable[[Rows, float], str]] = {
    "front": _front,
    "solver": _solver,
    "sensitivity": _sensitivity,
    "ablation": _ablation,
    "sharing": _sharing,
    "forward": _forward,
    "time": _time,
}
