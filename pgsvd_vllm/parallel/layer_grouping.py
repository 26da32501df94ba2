"""The layers that vLLM makes of a checkpoint's modules: which are merged, and what one tensor-parallel rank holds.

From names alone, as the common architectures have them: enough to tune kernels for, where a layer of another
sort only gets the tiles of a similar one, and to show what ranks will hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pgsvd_vllm.families import MERGED_GROUPS, REPLICATED, ROW_PARALLEL
from pgsvd_vllm.format.reader import Checkpoint
from pgsvd_vllm.kernels.layer_shape import ShardShape


@dataclass(frozen=True)
class LayerSizes:
    """One layer as one rank holds it.

    Attributes:
        columns: inputs.
        shards: at least one of them of low rank.
    """

    columns: int
    shards: tuple[ShardShape, ...]


def grouped_layers(checkpoint: Checkpoint, tensor_parallel: int = 1) -> Iterator[LayerSizes]:
    """Every layer with a factored module, in the order of the checkpoint's table, but those that no kernel runs.

    Those are experts, which are multiplied back on GPUs, and the output head.
    """
    for names, by_inputs in groups(checkpoint):
        if ".experts." in names[0] or names[0] == checkpoint.head:
            continue
        ranks = 1 if by_inputs is None else tensor_parallel
        cuts = [_cut(checkpoint, one, ranks, bool(by_inputs)) for one in names]
        yield LayerSizes(cuts[0][0], tuple(shard for _, shard in cuts))


def groups(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, ...], bool | None]]:
    """The modules of every layer with a factored one, and whether ranks cut it by inputs, in the table's order.

    None instead where every rank has all of it.
    """
    seen: set[str] = set()
    for name in checkpoint.modules:
        if name in seen:
            continue
        parent, _, leaf = name.rpartition(".")
        group = next((group for group in MERGED_GROUPS if leaf in group), (leaf,))
        names = [f"{parent}.{part}" if parent else part for part in group]
        known = [one for one in names if one in checkpoint.modules or f"{one}.weight" in checkpoint.tensors]
        seen.update(known)
        dotted = f".{name}"
        yield tuple(known), None if dotted.endswith(REPLICATED) else dotted.endswith(ROW_PARALLEL)


def _cut(checkpoint: Checkpoint, name: str, ranks: int, by_inputs: bool) -> tuple[int, ShardShape]:
    """(inputs, sizes) of a module on the first of several ranks."""
    module = checkpoint.modules.get(name)
    if module is None:
        out, columns = checkpoint.tensors[f"{name}.weight"].shape
    else:
        out, columns, _ = checkpoint.shape(name)
    columns, outs = (-(-columns // ranks), out) if by_inputs else (columns, -(-out // ranks))
    if module is None:
        return columns, ShardShape(outs)
    # Of all rows, the share that are pivots is taken to be the same on every rank.
    pivots = -(-module.rank * outs // out) if module.form == "pivot" else None
    return columns, ShardShape(outs, module.rank, pivots)
