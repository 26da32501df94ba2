"""What a report shows of one checkpoint: its projections by layer and kind, its front, and what it was made from."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import Checkpoint, read_json
from pgsvd_vllm.format.schema import REPORT_NAME

# A projection's name: the list of layers, the number of the layer, and the kind, of which experts form one.
_NAME = re.compile(r"(.*?)\.(\d+)\.(.*)")
_EXPERT = re.compile(r"\.\d+\.")
# The share of the front's rows by their unit.
_SHARES = ("removed", "time_removed", "bytes_removed")
_LOSSES = ("loss_nats", "stream_error")


@dataclass(frozen=True)
class Projection:
    """One projection as it is stored.

    Attributes:
        name: of the projection.
        tower: the list of layers that it belongs to, such as `model.layers`; its own name outside of such lists.
        layer: number of the layer, 0 outside of such lists.
        kind: its name in the layer, such as `self_attn.q_proj`; the numbers of MoE experts are left out.
        out_features, in_features: shape of its weight.
        rank: None if it is dense.
        nbytes: of its stored tensors; None if it is not part of the weight files.
        numel: of its matrices, those that are quantized included.
        error: relative output error of the stored factors on the calibration data; None if it is not known.
    """

    name: str
    tower: str
    layer: int
    kind: str
    out_features: int
    in_features: int
    rank: int | None
    nbytes: int
    numel: int
    error: float | None

    @property
    def kept(self) -> float:
        """Share of the parameters that is kept."""
        return self.numel / (self.out_features * self.in_features)


@dataclass(frozen=True)
class Content:
    """What a report shows.

    Attributes:
        title: of the page.
        facts: rows of name and value about the checkpoint as a whole.
        projections: in the order of the model.
        front: (removed share, predicted loss), ascending; empty if it was not measured.
        front_axes: what the two are.
        chosen: the removed share of this checkpoint on the front's axis; None if it is not known.
        other_bytes: of all tensors that belong to no projection: embeddings, norms, an LM head.
        itemsize: bytes of an element of the dense model.
    """

    title: str
    facts: list[tuple[str, str]]
    projections: list[Projection]
    front: list[tuple[float, float]]
    front_axes: tuple[str, str]
    chosen: float | None
    other_bytes: int
    itemsize: int


def content_of(checkpoint: Checkpoint, facts: Iterable[tuple[str, str]]) -> Content:
    """Collect what the report of a checkpoint shows.

    Args:
        checkpoint: to show.
        facts: rows of name and value about it.

    Raises:
        CheckpointError: the per-module report beside the weights is malformed.
    """
    path = checkpoint.folder / REPORT_NAME
    report = read_json(path) if path.is_file() else {}
    try:
        rows = report.get("modules") or [{"name": name} for name in checkpoint.modules]
        projections = [_projection(checkpoint, row) for row in rows]
        itemsize = 4 if checkpoint.config.get("dtype") == "float32" else 2
        front, axes = _front(report.get("front") or [])
        section = checkpoint.quantization_config
        ratio = section.get("ratio") or {}
        chosen = section.get("time_removed") if axes[0].startswith("GEMM") else ratio.get("linear")
        if axes[0].startswith("bytes"):
            dense = itemsize * sum(p.out_features * p.in_features for p in projections)
            chosen = 1 - sum(p.nbytes for p in projections) / dense
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        return Content(
            title=str(section.get("base_model") or checkpoint.folder.name),
            facts=list(facts),
            projections=projections,
            front=front,
            front_axes=axes,
            chosen=chosen,
            other_bytes=total - sum(p.nbytes for p in projections),
            itemsize=itemsize,
        )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: malformed ({type(error).__name__}: {error}); delete it") from None


def _projection(checkpoint: Checkpoint, row: dict[str, Any]) -> Projection:
    """A projection from its row of the per-module report, or of the module table."""
    name = row["name"]
    module = checkpoint.modules.get(name)
    if module is not None:
        out, width, _ = checkpoint.shape(name)
        numel = sum(math.prod(shape) for shape in module.shapes(out, width).values())
    else:
        out, width = row["out_features"], row["in_features"]
        numel = out * width
    stored = checkpoint.stored(name)
    found = _NAME.fullmatch(name)
    tower, layer, kind = (found[1], int(found[2]), found[3]) if found else (name, 0, name)
    rank = None if module is None or module.is_dense else module.rank
    error = None if rank is None else row.get("error")
    kind = _EXPERT.sub(".*.", kind)
    return Projection(name, tower, layer, kind, out, width, rank, sum(one.nbytes for one in stored), numel, error)


def _front(rows: list[dict[str, float]]) -> tuple[list[tuple[float, float]], tuple[str, str]]:
    """The points of the front, and what its axes are."""
    if not rows:
        return [], ("", "")
    share = next(key for key in _SHARES if key in rows[0])
    loss = next(key for key in _LOSSES if key in rows[0])
    points = [(float(row[share]), float(row[loss])) for row in rows]
    names = {
        "removed": "parameters of the projections removed",
        "time_removed": "GEMM time removed",
        "bytes_removed": "bytes of the projections removed",
        "loss_nats": "predicted loss, nats per token",
        "stream_error": "predicted error of the residual stream",
    }
    return sorted(points), (names[share], names[loss])
