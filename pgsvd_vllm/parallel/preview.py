"""What ranks of tensor parallelism hold and send of a checkpoint, without an engine; for pgsvd-vllm inspect."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pgsvd_vllm.families import may_run_on_side_stream
from pgsvd_vllm.format.reader import Checkpoint
from pgsvd_vllm.parallel.comm_plan import CommPlan, Cut
from pgsvd_vllm.parallel.layer_grouping import groups


@dataclass(frozen=True)
class LayerPlan:
    """One vLLM layer with a factored module.

    Attributes:
        names: of its modules.
        cut: what the ranks exchange inside it.
        here, whole: bytes of its weights on one rank (at most), and in the checkpoint.
        sent, dense: numbers a token that it sends, and would if it were dense, as of CommPlan.
    """

    names: tuple[str, ...]
    cut: Cut
    here: int
    whole: int
    sent: int
    dense: int


def preview(checkpoint: Checkpoint, workers: int, least: int) -> Iterator[LayerPlan]:
    """Every layer with a factored module, as the engine cuts it.

    Key/value heads are taken to be at least as many as ranks.

    Args:
        checkpoint: its table is in the order of the model.
        workers: ranks of tensor parallelism.
        least: as of CommPlan.
    """
    traffic = CommPlan(least)
    for names, by_inputs in groups(checkpoint):
        ranks = 1 if by_inputs is None else workers
        modules = {name: checkpoint.modules[name] for name in names if name in checkpoint.modules}
        first = next(iter(modules))
        out, columns, _ = checkpoint.shape(first)
        stored = checkpoint.tensors[f"{first}.{modules[first].suffixes[0]}"]
        itemsize = stored.nbytes // stored.numel
        sent, dense = traffic.sent, traffic.dense
        cut = Cut.REPLICATED
        if may_run_on_side_stream(first) or first == checkpoint.head:
            pass
        elif ranks > 1 and by_inputs:
            up = modules[first].shapes(out, columns)[modules[first].suffixes[1]]
            cut = traffic.by_inputs(modules[first].rank, up[0], out, ranks, itemsize)
        elif ranks > 1:
            cut = traffic.by_outputs([module.rank for module in modules.values()], columns, ranks, itemsize)
        here = whole = 0
        for name in names:
            module = modules.get(name)
            shapes = (
                {"weight": checkpoint.tensors[f"{name}.weight"].shape}
                if module is None
                else module.shapes(*checkpoint.shape(name)[:2])
            )
            for kind, shape in shapes.items():
                if kind == "pivots":
                    continue
                whole += itemsize * math.prod(shape)
                here += itemsize * _here(kind, shape, bool(by_inputs), cut, ranks)
        yield LayerPlan(names, cut, here, whole, traffic.sent - sent, traffic.dense - dense)


def _here(kind: str, shape: tuple[int, ...], by_inputs: bool, cut: Cut, workers: int) -> int:
    """Numbers of a tensor [rows, columns] on one rank."""
    rows, columns = shape
    if by_inputs and kind in ("weight_v", "weight_p", "weight"):
        columns = -(-columns // workers)
    elif kind in ("weight_v", "weight_p"):
        rows = -(-rows // workers) if cut is Cut.ALL_GATHER_Z else rows
    elif not by_inputs or cut is Cut.ALL_REDUCE_Z_GATHER_Y:
        rows = -(-rows // workers)
    return rows * columns
