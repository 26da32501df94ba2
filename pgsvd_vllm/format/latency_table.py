"""The table of what a product costs on the machine that will serve: written by `profile`, read by `compress`.

A JSON file: for every shape of weight, the microseconds of the dense product and of low-rank ones in
both forms at some ranks, all for the same number of tokens.
"""

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.format.reader import read_json
from pgsvd_vllm.format.schema import FORMS

LATENCY_TABLE_VERSION = 1


@dataclass(frozen=True)
class ShapeLatencies:
    """Times of one shape, in microseconds.

    Attributes:
        dense: of the plain product.
        forms: form -> (rank, time), ranks ascending; none where no rank saves numbers.
    """

    dense: float
    forms: dict[str, list[tuple[int, float]]]

    def of(self, form: str, rank: int) -> float:
        """The time at a rank: on the line between the two measured ranks around it, outside that of the nearest one."""
        points = self.forms[form]
        after = bisect_left(points, rank, key=lambda point: point[0])
        if after in (0, len(points)):
            return points[min(after, len(points) - 1)][1]
        (r0, t0), (r1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (rank - r0) / (r1 - r0)


@dataclass(frozen=True)
class LatencyTable:
    """Times of every shape of a model.

    Attributes:
        shapes: (out, in) -> its times.
        tokens: that were multiplied at once.
        dtype: of weights and inputs, such as bfloat16.
        machine: where it was measured, in words.
    """

    shapes: dict[tuple[int, int], ShapeLatencies]
    tokens: int
    dtype: str
    machine: str

    def time(self, out_features: int, in_features: int, form: str, rank: int | None) -> float:
        """Microseconds of a product with a weight [out, in]; dense where rank is None.

        Raises:
            InputError: the table has no such shape.
        """
        costs = self.shapes.get((out_features, in_features))
        if costs is None:
            raise InputError(
                f"`costs`: no times for weights of {out_features} x {in_features}; make the table with this model"
            )
        return costs.dense if rank is None else costs.of(form, rank)


def write_latencies(table: LatencyTable, path: Path) -> None:
    """Write the file, complete or not at all; raises OSError."""
    rows = [
        {"out": out, "in": width, "dense": costs.dense, **costs.forms} for (out, width), costs in table.shapes.items()
    ]
    content = {"version": LATENCY_TABLE_VERSION, "machine": table.machine, "tokens": table.tokens, "dtype": table.dtype}
    unfinished = path.with_name(f"{path.name}.writing")
    try:
        unfinished.write_text(json.dumps({**content, "shapes": rows}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_latencies(path: Path) -> LatencyTable:
    """Read and check a file.

    Raises:
        InputError: it is missing, is no such table, or holds what cannot be times.
    """
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise InputError(f"`costs` {error}") from None
    try:
        if content["version"] != LATENCY_TABLE_VERSION:
            raise InputError(
                f"`costs` {path}: version {content['version']}, this program reads {LATENCY_TABLE_VERSION}"
            )
        shapes = {(_whole(row["out"]), _whole(row["in"])): _shape(row) for row in content["shapes"]}
        return LatencyTable(shapes, _whole(content["tokens"]), str(content["dtype"]), str(content["machine"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"`costs` {path}: not a table of times ({type(error).__name__}: {error}); make it with pgsvd-vllm profile"
        ) from None


def _shape(row: dict[str, Any]) -> ShapeLatencies:
    forms = {form: [(_whole(rank), _time(time)) for rank, time in row[form]] for form in FORMS}
    for form, points in forms.items():
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise ValueError(f"{form}: ranks must ascend")
    return ShapeLatencies(_time(row["dense"]), forms)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no number above 0")
    return value


def _time(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no time")
    return float(value)
