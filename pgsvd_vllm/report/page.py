"""Lays out a report's sections as one HTML page with everything in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec

import pgsvd_vllm
from pgsvd_vllm.errors import InputError


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: shown.
        key: number to sort by; None for cells that are sorted by their text.
        is_text: whether it is prose, which keeps its line breaks.
    """

    text: str
    key: float | None = None
    is_text: bool = False


def number(value: float | None, form: str) -> Cell:
    """The cell of a number in a format, or of one that is not known."""
    return Cell("-", -1.0) if value is None else Cell(form.format(value), value)


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        text: a sentence below the heading.
        svg: a chart.
        head: names of the table's columns.
        rows: of the table.
        sortable: whether a click on a column's name sorts the table.
    """

    title: str
    text: str = ""
    svg: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = field(default_factory=list)
    sortable: bool = False


def missing_libraries() -> list[str]:
    """The libraries that a report needs and that are not installed."""
    return [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]


def check_libraries() -> None:
    """Refuse to start without the libraries that a report needs; raises InputError."""
    missing = missing_libraries()
    if missing:
        raise InputError(f"the report needs {' and '.join(missing)}: pip install 'pgsvd-vllm[plot]'")


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: of the page.
        facts: rows of name and value at its top.
        sections: in order.
    """
    from jinja2 import Environment

    source = files("pgsvd_vllm.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    footer = f"pgsvd-vllm {pgsvd_vllm.__version__}"
    return template.render(title=title, facts=facts, sections=sections, footer=footer)
