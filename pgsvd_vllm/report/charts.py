"""Charts as SVG, by matplotlib: text in the page's colour, and tooltips on the marks."""

import hashlib
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from pgsvd_vllm.report.content import Projection

# Written by matplotlib and replaced by the colour of the page's text.
_INK = "#010203"
_SVG = "http://www.w3.org/2000/svg"
WIDTH = 7.0
# Layers of a heat map with a number on the axis.
_TICKS = 16


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend; empty for none.
        points: (x, y).
        notes: tooltip of each point.
        marked: indices of points that stand out.
    """

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    marked: Collection[int] = ()


def _pyplot() -> Any:
    """matplotlib's pyplot without a display."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "svg.hashsalt": "pgsvd",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
            **{"axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False},
        }
    )
    return pyplot


def _svg(figure: Any, notes: dict[str, str]) -> str:
    """A figure as an SVG element.

    Args:
        figure: of matplotlib; closed.
        notes: gid of a mark -> its tooltip.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    _pyplot().close(figure)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter(f"{{{_SVG}}}g"):
        note = notes.get(element.get("id", ""))
        if note is not None:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = note
            element.insert(0, title)
            element.set("class", "mark")
    for part in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(part)
    root.attrib.pop("height", None)
    root.set("width", "100%")
    root.set("role", "img")
    text = ElementTree.tostring(root, encoding="unicode").replace(_INK, "currentColor")
    # Every chart of a page needs ids of its own.
    prefix = f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)


def lines(
    series: Sequence[Series],
    labels: tuple[str, str],
    log: bool = False,
    percent: bool = True,
    here: tuple[str, float] | None = None,
) -> str:
    """A line chart.

    Args:
        series: to draw.
        labels: of the two axes.
        log: logarithmic y axis.
        percent: x is a share, shown in percent.
        here: name and x of a vertical line.
    """
    pyplot = _pyplot()
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    notes: dict[str, str] = {}
    for number, one in enumerate(series):
        x = [100 * p[0] if percent else p[0] for p in one.points]
        y = [p[1] for p in one.points]
        color = f"C{number}"
        axes.plot(x, y, color=color, label=one.name or None, linewidth=1.5)
        for place, note in enumerate(one.notes):
            key = f"mark{number}-{place}"
            size, edge = (9, _INK) if place in one.marked else (5, color)
            (mark,) = axes.plot(x[place], y[place], "o", color=color, markersize=size, markeredgecolor=edge)
            mark.set_gid(key)
            notes[key] = note
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        # Beyond two decades the labels between the powers of ten would run into each other.
        axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else NullFormatter())
    axes.set(xlabel=f"{labels[0]}, %" if percent else labels[0], ylabel=labels[1])
    axes.grid(alpha=0.25, which="both")
    if here is not None:
        axes.axvline(100 * here[1] if percent else here[1], color=_INK, linestyle="--", linewidth=1, label=here[0])
    if here is not None or any(one.name for one in series):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)  # above: lines may be anywhere
    return _svg(figure, notes)


def bars(rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """Horizontal bars: a wide pale one for what there was, a narrow one inside of it for what is kept.

    Args:
        rows: (name, before, after), from the top.
        label: of the x axis.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.6 + 0.32 * len(rows)))
    notes: dict[str, str] = {}
    for place, (name, before, after) in enumerate(rows):
        for width, height, color, kind in ((before, 0.8, "#9aa5b155", "before"), (after, 0.5, "C0", "after")):
            (bar,) = axes.barh(place, width, height, color=color)
            bar.set_gid(f"{kind}{place}")
            share = f" ({after / before:.0%} kept)" if before else ""
            notes[f"{kind}{place}"] = f"{name}: {after:.1f} of {before:.1f}{share}"
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, axis="x")
    return _svg(figure, notes)


def grouped_bars(rows: Sequence[tuple[str, str, float]], label: str, log: bool = False) -> str:
    """Horizontal bars, one colour a group.

    Args:
        rows: (name, group, value), from the top.
        label: of the x axis.
        log: logarithmic x axis.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.7 + 0.28 * len(rows)))
    groups = list(dict.fromkeys(group for _, group, _ in rows))
    notes: dict[str, str] = {}
    for place, (name, group, value) in enumerate(rows):
        number = groups.index(group)
        first = all(row[1] != group for row in rows[:place])
        (bar,) = axes.barh(place, value, 0.7, color=f"C{number}", label=group if first else None)
        bar.set_gid(f"bar{place}")
        notes[f"bar{place}"] = f"{name}, {group}: {value:.4g}"
        axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, axis="x")
    if len(groups) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return _svg(figure, notes)


def heat_map(projections: Iterable[Projection]) -> str:
    """The kept share of the parameters by layer and kind; MoE experts of one layer are one cell.

    Args:
        projections: of one tower.
    """
    pyplot = _pyplot()
    cells: dict[tuple[str, int], list[Projection]] = {}
    for p in projections:
        cells.setdefault((p.kind, p.layer), []).append(p)
    kinds, layers = list(dict.fromkeys(key[0] for key in cells)), sorted({key[1] for key in cells})
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.8 + 0.3 * len(kinds)))
    colours = pyplot.get_cmap("viridis")
    notes: dict[str, str] = {}
    for (kind, layer), row in cells.items():
        dense = sum(p.out_features * p.in_features for p in row)
        share = sum(p.numel for p in row) / dense
        place = layers.index(layer), kinds.index(kind)
        key = f"cell{place[0]}-{place[1]}"
        cell = pyplot.Rectangle(place, 1, 1, facecolor=colours(min(share, 1.0)), linewidth=0, gid=key)
        axes.add_patch(cell)
        notes[key] = _note(row, share)
    step = max(1, -(-len(layers) // _TICKS))
    axes.set_xticks([n + 0.5 for n in range(0, len(layers), step)], [str(n) for n in layers[::step]])
    axes.set_yticks([n + 0.5 for n in range(len(kinds))], kinds)
    axes.set(xlim=(0, len(layers)), ylim=(len(kinds), 0), xlabel="layer")
    scale = pyplot.cm.ScalarMappable(cmap=colours, norm=pyplot.Normalize(0, 100))
    bar = figure.colorbar(scale, ax=axes, pad=0.02, label="kept, %")
    bar.outline.set_visible(False)
    return _svg(figure, notes)


def _note(row: Sequence[Projection], share: float) -> str:
    """The tooltip of a cell of the heat map."""
    first = row[0]
    if len(row) > 1:
        factored = sum(p.rank is not None for p in row)
        return f"layer {first.layer}, {len(row)} x {first.kind}: {factored} factored, {share:.0%} of parameters kept"
    rank = "dense" if first.rank is None else f"rank {first.rank} of {min(first.out_features, first.in_features)}"
    error = "" if first.error is None else f", output error {first.error:.1%}"
    return f"{first.name} ({first.out_features} x {first.in_features}): {rank}, {share:.0%} kept{error}"
