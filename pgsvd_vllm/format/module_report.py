"""Reads pgsvd_report.json, the optional per-module report of a checkpoint."""

from dataclasses import dataclass
from typing import Any

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import Checkpoint, read_json
from pgsvd_vllm.format.schema import REPORT_NAME

# Key of a front's share -> what it is a share of.
SHARES = {
    "removed": "parameters of the projections removed",
    "time_removed": "GEMM time removed",
    "bytes_removed": "bytes of the projections removed",
}
LOSSES = {
    "loss_nats": "predicted loss, nats per token",
    "stream_error": "predicted error of the residual stream",
}


@dataclass(frozen=True)
class Front:
    """The predicted loss of every size.

    Attributes:
        share: a key of SHARES.
        loss: a key of LOSSES.
        points: (share, loss), ascending.
    """

    share: str
    loss: str
    points: list[tuple[float, float]]


def module_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows of the per-module report, or of the module table if the checkpoint has no report.

    Raises:
        CheckpointError: the report is malformed, or describes another checkpoint.
    """
    path = checkpoint.folder / REPORT_NAME
    known = {name: checkpoint.shape(name) for name in checkpoint.modules}
    shapes = {name: known[name] for name in checkpoint.factored}
    if path.is_file():
        rows = read_json(path).get("modules")
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise CheckpointError(f"{path}: malformed report; delete it to see the table without errors")
        reported = {row["name"]: (row["out_features"], row["in_features"], row["rank"]) for row in rows}
        factored = {name: shape for name, shape in reported.items() if shape[2] is not None}
        if factored != shapes or len(reported) < len(rows):
            differing = next((name for name in [*shapes, *factored] if shapes.get(name) != factored.get(name)), "a row")
            raise CheckpointError(
                f"{path}: does not describe this checkpoint, {differing} differs; delete it to see the table without "
                "errors"
            )
        return rows
    return [
        {"name": name, "out_features": out, "in_features": width, "rank": rank or None, "error": None}
        for name, (out, width, rank) in known.items()
    ]


def front(checkpoint: Checkpoint) -> Front | None:
    """The front of the per-module report; None if there is none.

    Raises:
        CheckpointError: it is malformed.
    """
    path = checkpoint.folder / REPORT_NAME
    rows = read_json(path).get("front") if path.is_file() else None
    if not rows:
        return None
    try:
        share = next(key for key in SHARES if key in rows[0])
        loss = next(key for key in LOSSES if key in rows[0])
        return Front(share, loss, sorted((float(row[share]), float(row[loss])) for row in rows))
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
        raise CheckpointError(f"{path}: malformed front; delete the file to see the checkpoint without it") from None


def _is_row(row: Any) -> bool:
    """Whether a row of the report has every field, each of its type."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and is_size(row.get("out_features"))
        and is_size(row.get("in_features"))
        and "rank" in row
        and (row["rank"] is None or is_size(row["rank"]))
        and "error" in row
        and (row["error"] is None or isinstance(row["error"], int | float))
    )
