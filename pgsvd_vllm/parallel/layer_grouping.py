"""Groups a checkpoint's modules into the layers that vLLM builds from them, with their sizes on a tensor-parallel rank.

The grouping uses names alone, as the common architectures have them. That is enough to tune kernels, where a wrongly
grouped layer gets the tiles of a similar one, and to preview the memory of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pgsvd_vllm.families import MERGED_GROUPS, Split, split_of
from pgsvd_vllm.format.reader import Checkpoint
from pgsvd_vllm.kernels.layer_shape import ShardShape


@dataclass(frozen=True)
class LayerSizes:
    """One layer as one rank holds it.

    Attributes:
        columns: inputs.
        shards: at least one of them is low-rank.
    """

    columns: int
    shards: tuple[ShardShape, ...]


def grouped_layers(checkpoint: Checkpoint, tensor_parallel: int = 1) -> Iterator[LayerSizes]:
    """Every layer with a factored module that the Triton kernels run and `tune` measures, in the table's order.

    The kernels do not run MoE experts, which are reconstructed on GPUs, nor the LM head. Quantized layers keep the
    default tiles.
    """
    for names, split in groups(checkpoint):
        modules = [checkpoint.modules[name] for name in names if name in checkpoint.modules]
        if any(module.kind != "linear" or module.schemes for module in modules):
            continue
        tp_size = 1 if split is Split.NONE else tensor_parallel
        cuts = [_cut(checkpoint, one, tp_size, split is Split.INPUTS) for one in names]
        yield LayerSizes(cuts[0][0], tuple(shard for _, shard in cuts))


def groups(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, ...], Split]]:
    """The modules of every layer with a factored one, and how vLLM shards it, in the table's order."""
    seen: set[str] = set()
    for name in checkpoint.modules:
        if name in seen:
            continue
        known = [
            one for one in merged_names(name) if one in checkpoint.modules or f"{one}.weight" in checkpoint.tensors
        ]
        seen.update(known)
        yield tuple(known), split_of(name)


def merged_names(name: str) -> list[str]:
    """The names of the modules of the layer that vLLM makes of a module and its siblings; the name itself is one."""
    parent, _, leaf = name.rpartition(".")
    group = next((group for group in MERGED_GROUPS if leaf in group), (leaf,))
    return [f"{parent}.{part}" if parent else part for part in group]


def _cut(checkpoint: Checkpoint, name: str, tp_size: int, by_inputs: bool) -> tuple[int, ShardShape]:
    """(inputs, sizes) of a module on the first tensor-parallel rank."""
    module = checkpoint.modules.get(name)
    if module is None:
        out, columns = checkpoint.tensors[f"{name}.weight"].shape
    else:
        out, columns, _ = checkpoint.shape(name)
    columns, outs = (-(-columns // tp_size), out) if by_inputs else (columns, -(-out // tp_size))
    if module is None or module.is_dense:
        return columns, ShardShape(outs)
    # Assumes that every rank has the same share of the pivot rows.
    pivots = -(-module.rank * outs // out) if module.form == "pivot" else None
    return columns, ShardShape(outs, module.rank, pivots)
