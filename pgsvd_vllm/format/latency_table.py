"""The table of GEMM latencies of the serving machine, measured or computed: written by `profile`, read by `compress`.

For every weight shape the JSON file holds the latency, in microseconds, of the dense GEMM and of low-rank layers in
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
from pgsvd_vllm.format.schema import FORMS, stored_size

LATENCY_TABLE_VERSION = 1
# Fractions of the largest rank that saves anything; 0 stands for the smallest rank.
RANK_FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
RANK_MULTIPLE = 16
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class ShapeLatencies:
    """Latencies of one weight shape, in microseconds.

    Attributes:
        dense: of the dense GEMM.
        forms: form -> (rank, latency), ranks ascending; empty if no rank stores fewer elements than the dense weight.
    """

    dense: float
    forms: dict[str, list[tuple[int, float]]]

    def of(self, form: str, rank: int) -> float:
        """The latency at a rank, in microseconds.

        Between two measured ranks it is interpolated linearly, outside it is that of the nearest measured rank.
        """
        points = self.forms[form]
        after = bisect_left(points, rank, key=lambda point: point[0])
        if after in (0, len(points)):
            return points[min(after, len(points) - 1)][1]
        (r0, t0), (r1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (rank - r0) / (r1 - r0)


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of every weight shape of a model.

    Attributes:
        shapes: (out, in) -> its latencies.
        tokens: tokens per GEMM.
        dtype: of weights and inputs, such as `bfloat16`.
        machine: description of the machine.
        device: `cpu` or `gpu`.
    """

    shapes: dict[tuple[int, int], ShapeLatencies]
    tokens: int
    dtype: str
    machine: str
    device: str = "cpu"

    def latency(self, out_features: int, in_features: int, form: str, rank: int | None) -> float:
        """The latency of a layer with a weight [out, in], in microseconds; of the dense one if `rank` is None.

        Raises:
            InputError: the table lacks the shape.
        """
        latencies = self.shapes.get((out_features, in_features))
        if latencies is None:
            raise InputError(
                f"`costs`: no latencies for weights of {out_features} x {in_features}; make the table with this model"
            )
        return latencies.dense if rank is None else latencies.of(form, rank)


def ranks_of_table(form: str, out: int, width: int) -> list[int]:
    """Some ranks from the smallest to the largest that saves memory; none if no rank does."""
    saving = [rank for rank in range(1, min(out, width)) if stored_size(form, out, width, rank) < out * width]
    if not saving:
        return []
    step = RANK_MULTIPLE if saving[-1] >= 8 * RANK_MULTIPLE else 1
    return sorted({max(step, int(fraction * saving[-1]) // step * step) for fraction in RANK_FRACTIONS})


def write_latencies(table: LatencyTable, path: Path) -> None:
    """Write the file, complete or not at all; raises OSError if it cannot be written."""
    rows = [
        {"out": out, "in": width, "dense": latencies.dense, **latencies.forms}
        for (out, width), latencies in table.shapes.items()
    ]
    content = {
        "version": LATENCY_TABLE_VERSION,
        "machine": table.machine,
        "device": table.device,
        "tokens": table.tokens,
        "dtype": table.dtype,
    }
    unfinished = path.with_name(f"{path.name}.writing")
    try:
        unfinished.write_text(json.dumps({**content, "shapes": rows}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_latencies(path: Path) -> LatencyTable:
    """Read and validate a file.

    Raises:
        InputError: the file is missing, is not a latency table, has another version, or holds an invalid value.
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
        shapes = {(_positive(row["out"]), _positive(row["in"])): _shape(row) for row in content["shapes"]}
        device = content.get("device", "cpu")
        if device not in DEVICES:
            raise ValueError(f"device {device!r} is none of {', '.join(DEVICES)}")
        return LatencyTable(
            shapes, _positive(content["tokens"]), str(content["dtype"]), str(content["machine"]), device
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"`costs` {path}: not a latency table ({type(error).__name__}: {error}); make it with pgsvd-vllm profile"
        ) from None


def _shape(row: dict[str, Any]) -> ShapeLatencies:
    """The latencies of one row; raises ValueError, KeyError or TypeError if it is malformed."""
    forms = {form: [(_positive(rank), _latency(latency)) for rank, latency in row[form]] for form in FORMS}
    for form, points in forms.items():
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise ValueError(f"{form}: ranks must ascend")
    return ShapeLatencies(_latency(row["dense"]), forms)


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is not a positive integer")
    return value


def _latency(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a latency above 0")
    return float(value)
