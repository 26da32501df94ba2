"""The bytes of written tensors, and the limit on those of all weights."""

from collections.abc import Mapping

import torch

from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.format.dtypes import stored_bytes
from pgsvd_vllm.format.schema import FLOAT_DTYPES
from pgsvd_vllm.hf.transformers_compat import loaded_dtype
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.target import Limit

# Bytes of a tensor's entry in the header of its file, and the most tensors of a projection.
ENTRY_BYTES, MOST_TENSORS = 160, 5
FLOATS = ("F64", *FLOAT_DTYPES)


def itemsizes_of(source: ModelSource, projections: ProjectionSet, dtype: torch.dtype | None) -> dict[str, int]:
    """Projection -> bytes of an element of its matrices that are not quantized.

    Args:
        source: the model.
        projections: of the run.
        dtype: of the written tensors; None keeps each tensor's own.
    """
    if dtype is not None:
        return dict.fromkeys((p.name for p in projections.every), dtype.itemsize)
    return {p.name: stored_bytes(source.weights.header(f"{p.path}.weight").dtype, 1) for p in projections.every}


def byte_limit(
    source: ModelSource,
    projections: ProjectionSet,
    itemsizes: Mapping[str, int],
    dtype: torch.dtype | None,
    target: int,
) -> Limit:
    """The limit on the bytes of all weights, which the projections alone can keep.

    Args:
        source: the model.
        projections: of the run; ignored ones keep their bytes and count as projections.
        itemsizes: of `itemsizes_of`.
        dtype: of the written tensors; None keeps each tensor's own.
        target: largest size of the weight files in bytes.

    Raises:
        InputError: the model is as small already, or its other tensors alone are larger.
    """
    own = sum(p.numel * itemsizes[p.name] for p in projections.every)
    # Where MoE experts are stacked, several projections are one stored tensor.
    stored = {n for p in projections.every for n in source.weights.stored_as(f"{p.path}.weight")}
    infos = source.weights.tensors
    total = own + ENTRY_BYTES * (len(infos) + MOST_TENSORS * len(projections.flat))
    for name, info in infos.items():
        if name not in stored:
            converts = dtype is not None and info.dtype in FLOATS and loaded_dtype(source.model, name, dtype) == dtype
            total += info.numel * dtype.itemsize if dtype is not None and converts else info.nbytes
    if target >= total:
        raise InputError(f"--target-bytes {target}: the weights have {bytes_text(total)} already")
    if target <= total - own:
        raise InputError(
            f"--target-bytes {target}: too small, embeddings and all else that is not compressed take "
            f"{bytes_text(total - own)} of {bytes_text(total)}"
        )
    return Limit("target_bytes", target, total, own, "bytes")
