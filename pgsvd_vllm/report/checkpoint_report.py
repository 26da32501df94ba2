"""The report of one checkpoint: where its parameters went, what stayed dense, and what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pgsvd_vllm.errors import escaped
from pgsvd_vllm.format.module_report import LOSSES, SHARES, Front
from pgsvd_vllm.report.charts import Series, bars, heat_map, lines
from pgsvd_vllm.report.content import Content, Projection
from pgsvd_vllm.report.page import Cell, Section, number, render

# Rows of the table of projections; MoE models may have tens of thousands.
MOST_ROWS = 2500


def checkpoint_report(content: Content, evaluation: Mapping[str, Any] | None = None) -> str:
    """The HTML page of one checkpoint.

    Args:
        content: of the checkpoint.
        evaluation: what `pgsvd-vllm evaluate --json` wrote.
    """
    sections = [*(_measured(evaluation) if evaluation else ()), *_sections(content)]
    return render(f"{content.title}, compressed", content.facts, sections)


def _measured(evaluation: Mapping[str, Any]) -> Iterator[Section]:
    """What `evaluate` measured, and the answers side by side."""
    head = ("measured on", "unit", "compressed", "base", "kept", "95 % interval")
    rows = [
        [
            Cell(escaped(str(row["name"]))),
            Cell(str(row["unit"])),
            number(row["value"], "{:.4g}"),
            number(row.get("base"), "{:.4g}"),
            number(row.get("recovery"), "{:.1%}"),
            Cell("" if row.get("low") is None or row.get("high") is None else f"{row['low']:.1%} to {row['high']:.1%}"),
        ]
        for row in evaluation.get("rows", ())
    ]
    if rows:
        yield Section("Quality", head=head, rows=rows)
    answers = evaluation.get("answers") or []
    if answers:
        names = [name for name in answers[0] if name != "prompt"]
        yield Section(
            "Answers",
            "Greedy.",
            head=("prompt", *names),
            rows=[
                [Cell(escaped(str(one.get(name, ""))), is_text=True) for name in ("prompt", *names)] for one in answers
            ],
        )


def _sections(content: Content) -> Iterator[Section]:
    """The charts and the table of the projections."""
    towers: dict[str, list[Projection]] = {}
    for p in content.projections:
        towers.setdefault(p.tower, []).append(p)
    in_layers = {name: row for name, row in towers.items() if len({p.layer for p in row}) > 1}
    for name, row in in_layers.items():
        of = f" of {name}" if len(in_layers) > 1 else ""
        dense = sum(p.rank is None for p in row)
        yield Section(
            f"Kept parameters by layer{of}",
            "The share of a projection's parameters that its factors have. Compression costs most where it is bright"
            + (f"; {dense} of {len(row)} stay dense." if dense else "."),
            svg=heat_map(row),
        )
    yield Section("Where the bytes went", svg=bars(_bytes(content), "MB; pale: of the dense model"))
    errors = _errors(content.projections)
    if errors:
        yield Section(
            "Output error by layer",
            "Of the stored factors on the calibration activations, relative to the dense output.",
            svg=lines(errors, ("layer", "relative error"), percent=False),
        )
    if content.front is not None:
        yield Section("What another size would cost", svg=_front(content.front, content.removed))
    yield _table(content.projections)


def _bytes(content: Content) -> list[tuple[str, float, float]]:
    """(kind, MB of the dense model, MB now) of each kind of projection, and of everything else."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for p in content.projections:
        before[p.kind] = before.get(p.kind, 0.0) + content.itemsize * p.out_features * p.in_features / 1e6
        after[p.kind] = after.get(p.kind, 0.0) + p.nbytes / 1e6
    rest = content.other_bytes / 1e6
    return [*((kind, before[kind], after[kind]) for kind in before), ("all else", rest, rest)]


def _errors(projections: Sequence[Projection]) -> list[Series]:
    """The output error of each kind over the layers of the largest tower."""
    known = [p for p in projections if p.error is not None]
    if not known:
        return []
    names = [p.tower for p in known]
    tower = max(dict.fromkeys(names), key=names.count)
    kinds: dict[str, dict[int, list[float]]] = {}
    for p in known:
        if p.tower == tower and p.error is not None:
            kinds.setdefault(p.kind, {}).setdefault(p.layer, []).append(p.error)
    found = []
    for kind, layers in kinds.items():
        points = [(float(layer), sum(row) / len(row)) for layer, row in sorted(layers.items())]
        found.append(Series(kind, points, [f"layer {x:.0f} {kind}: {y:.1%}" for x, y in points]))
    return found


def _front(front: Front, removed: float | None) -> str:
    """The front, with the size of this checkpoint where it is measured in the same way."""
    notes = [f"{x:.0%} removed: {y:.3g}" for x, y in front.points]
    here = None if removed is None or front.share != "removed" else ("this checkpoint", removed)
    labels = SHARES[front.share], LOSSES[front.loss]
    return lines([Series("", front.points, notes)], labels, log=True, here=here)


def _table(projections: Sequence[Projection]) -> Section:
    """The table of all projections."""
    rows = [
        [
            Cell(p.name),
            Cell(f"{p.out_features} x {p.in_features}", p.out_features * p.in_features),
            Cell("dense", -1.0) if p.rank is None else Cell(str(p.rank), p.rank),
            Cell(f"{p.kept:.1%}", p.kept),
            Cell(f"{p.nbytes / 1e6:.2f}", p.nbytes),
            number(p.error, "{:.1%}"),
        ]
        for p in projections[:MOST_ROWS]
    ]
    more = len(projections) - len(rows)
    text = f"The first {len(rows)}; `pgsvd-vllm inspect` shows the other {more}." if more > 0 else ""
    head = ("projection", "out x in", "rank", "kept", "MB", "output error")
    return Section("Projections", text, head=head, rows=rows, sortable=True)
