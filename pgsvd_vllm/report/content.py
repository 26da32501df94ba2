"""What a report shows of one checkpoint: its projections by layer and kind, its front, and what it was made from."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pgsvd_vllm.errors import escaped
from pgsvd_vllm.format.module_report import Front, front, module_rows
from pgsvd_vllm.format.reader import Checkpoint
from pgsvd_vllm.format.schema import FLOAT_DTYPES

# A projection's name: the list of layers, the number of the layer, and the kind, of which experts form one.
_NAME = re.compile(r"(.*?)\.(\d+)\.(.*)")
_EXPERT = re.compile(r"\.\d+\.")


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
        nbytes: of its stored tensors.
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
        front: predicted losses; None if they were not measured.
        removed: share of the projections' parameters that is removed; None if it is not known.
        other_bytes: of all tensors that belong to no projection: embeddings, norms, an LM head.
        itemsize: bytes of an element of the dense model.
    """

    title: str
    facts: list[tuple[str, str]]
    projections: list[Projection]
    front: Front | None
    removed: float | None
    other_bytes: int
    itemsize: int


def content_of(checkpoint: Checkpoint, facts: Iterable[tuple[str, str]]) -> Content:
    """Collect what the report of a checkpoint shows.

    Args:
        checkpoint: to show.
        facts: rows of name and value about it.

    Raises:
        CheckpointError: the per-module report beside the weights is malformed, or describes another checkpoint.
    """
    projections = [_projection(checkpoint, row) for row in module_rows(checkpoint)]
    section = checkpoint.quantization_config
    ratio = section.get("ratio")
    return Content(
        title=escaped(str(section.get("base_model") or checkpoint.folder.name)),
        facts=[(name, escaped(value)) for name, value in facts],
        projections=projections,
        front=front(checkpoint),
        removed=ratio.get("linear") if isinstance(ratio, dict) else None,
        other_bytes=sum(info.nbytes for info in checkpoint.tensors.values()) - sum(p.nbytes for p in projections),
        itemsize=_itemsize(checkpoint),
    )


def _itemsize(checkpoint: Checkpoint) -> int:
    """Bytes of an element in the dtype of most of the tensors that are not quantized."""
    sizes: Counter[int] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT_DTYPES and info.numel:
            sizes[info.nbytes // info.numel] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else 2


def _projection(checkpoint: Checkpoint, row: dict[str, Any]) -> Projection:
    """A projection from its row of the per-module report, or of the module table."""
    name, out, width = row["name"], row["out_features"], row["in_features"]
    module = checkpoint.modules.get(name)
    numel = out * width
    if module is not None:
        numel = sum(math.prod(shape) for shape in module.shapes(out, width).values())
    found = _NAME.fullmatch(escaped(name))
    tower, layer, kind = (found[1], int(found[2]), found[3]) if found else (escaped(name), 0, escaped(name))
    rank = None if module is None or module.is_dense else module.rank
    return Projection(
        escaped(name),
        tower,
        layer,
        _EXPERT.sub(".*.", kind),
        out,
        width,
        rank,
        sum(info.nbytes for info in checkpoint.stored(name)),
        numel,
        None if rank is None else row["error"],
    )
