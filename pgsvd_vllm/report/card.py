"""The table of a model card: what `evaluate` measured."""

from collections.abc import Mapping
from typing import Any


def quality_table(evaluation: Mapping[str, Any]) -> str:
    """What was measured, as Markdown; empty without measurements.

    Args:
        evaluation: what `pgsvd-vllm evaluate --json` wrote.
    """
    rows = evaluation["rows"]
    if not rows:
        return ""
    lines = ["| measured on | unit | base | compressed | kept | 95 % interval |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row.get("low"), row.get("high")
        cells = (
            *(_plain(row["name"]), _plain(row["unit"])),
            *(_number(row.get("base"), "{:.4g}"), _number(row["value"], "{:.4g}")),
            _number(row.get("recovery"), "{:.1%}"),
            "" if low is None or high is None else f"{low:.1%} to {high:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain(text: object) -> str:
    """A cell's text, which must not end the cell or the line, nor begin HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None, layout: str) -> str:
    return "" if value is None else layout.format(value)
