"""The questions of a study, and the rows that answer them."""

from dataclasses import dataclass
from typing import Any

FRONT, SOLVER, SENSITIVITY, ABLATION, SHARING, FORWARD, TIME = QUESTIONS = (
    *("front", "solver", "sensitivity", "ablation", "sharing", "forward", "time"),
)


@dataclass(frozen=True)
class Row:
    """One measured value.

    Attributes:
        question: one of QUESTIONS.
        case: what was measured.
        value: None where it could not be measured.
        series: the column of the question's table, or the line of its chart.
        at: the line of the table, or the place on the chart's x axis; None for a value that is in neither.
        bar: the value may not exceed it; None without a bar.
    """

    question: str
    case: str
    value: float | None
    series: str = ""
    at: float | str | None = None
    bar: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row for a JSON file; `bar` and `ok` are there where it has a bar."""
        found: dict[str, Any] = {"question": self.question, "case": self.case, "value": self.value}
        found |= {"series": self.series, "at": self.at}
        if self.bar is not None:
            found |= {"bar": self.bar, "ok": self.value is not None and self.value <= self.bar}
        return found
