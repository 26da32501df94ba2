"""Memory and traffic of a checkpoint on tensor-parallel ranks, without an engine; for `pgsvd-vllm inspect --tp`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pgsvd_vllm.families import Split
from pgsvd_vllm.format.quantization import PACKED, PER_INT32, SCALE
from pgsvd_vllm.format.reader import Checkpoint
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.parallel.comm_plan import CommPlan, Cut, ParallelLayer
from pgsvd_vllm.parallel.layer_grouping import groups


@dataclass(frozen=True)
class LayerPlan:
    """One vLLM layer with a factored module.

    Attributes:
        names: of its modules.
        cut: its tensor-parallel cut.
        here, whole: bytes of its weights on one rank (at most), and in the checkpoint.
        sent, dense: its traffic in elements per token, and that of the dense layer; see CommPlan.
    """

    names: tuple[str, ...]
    cut: Cut
    here: int
    whole: int
    sent: int
    dense: int


def preview(checkpoint: Checkpoint, tensor_parallel: int, least: int) -> Iterator[LayerPlan]:
    """Every layer with a factored module, as the engine cuts it.

    Assumes at least as many key/value heads as ranks.

    Args:
        checkpoint: its table is in the order of the model.
        tensor_parallel: ranks.
        least: as of CommPlan.
    """
    plan = CommPlan(least)
    for names, split in groups(checkpoint):
        tp_size = 1 if split is Split.NONE else tensor_parallel
        modules = {name: checkpoint.modules[name] for name in names if name in checkpoint.modules}
        first = next(iter(modules))
        out, columns, _ = checkpoint.shape(first)
        stored = checkpoint.tensors[f"{first}.{modules[first].suffixes[0]}"]
        itemsize = stored.nbytes // stored.numel
        low_rank = tuple(module for module in modules.values() if not module.is_dense)
        sent, dense = plan.sent, plan.dense
        cut = plan.choose(ParallelLayer(first, split, low_rank, columns, out, itemsize), tp_size)
        here = whole = 0.0
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
                per_element = _bytes(checkpoint, name, module, kind)
                whole += per_element * math.prod(shape)
                here += per_element * _here(kind, shape, split is Split.INPUTS, cut, tp_size)
        yield LayerPlan(names, cut, round(here), round(whole), plan.sent - sent, plan.dense - dense)


def _bytes(checkpoint: Checkpoint, name: str, module: FactoredModule | None, kind: str) -> float:
    """Bytes of an element of a matrix; those of a quantized one have their part of the scales."""
    quantized = module is not None and kind in module.schemes
    stored = [checkpoint.tensors[f"{name}.{kind}{end}"] for end in ((PACKED, SCALE) if quantized else ("",))]
    elements = stored[0].numel * (PER_INT32 if quantized and stored[0].dtype == "I32" else 1)
    return sum(info.nbytes for info in stored) / elements


def _here(kind: str, shape: tuple[int, ...], by_inputs: bool, cut: Cut, tp_size: int) -> int:
    """Elements of a tensor [rows, columns] on one rank."""
    rows, columns = shape
    if by_inputs and kind in ("weight_v", "weight_p", "weight"):
        columns = -(-columns // tp_size)
    elif kind in ("weight_v", "weight_p"):
        rows = -(-rows // tp_size) if cut is Cut.ALL_GATHER_Z else rows
    elif not by_inputs or cut is Cut.ALL_REDUCE_Z_GATHER_Y:
        rows = -(-rows // tp_size)
    return rows * columns
