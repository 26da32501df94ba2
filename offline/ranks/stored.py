"""How a projection is stored with a rank: its row of the module table, its size, and the ranks that it may have."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pgsvd_vllm.format.quantization import INT8
from pgsvd_vllm.format.schema import DENSE, FactoredModule, stored_size
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.settings import Storage

# Ranks are rounded up to a multiple of the hardware's tile size if both sides of the matrix are at least ROUND_FROM.
RANK_MULTIPLE = 16
ROUND_FROM = 256
# The same for 4-bit factors, whose kernels on GPUs take inputs by this multiple.
WIDE_MULTIPLE = 128
WIDE_FROM = 1024
# Projections with fewer outputs are not quantized: they are gates, and vLLM has no kernels for them.
LEAST_OUTPUTS = 16

PLAIN = FactoredModule(0, DENSE)


def module_of(projection: Projection, rank: int | None, storage: Storage) -> FactoredModule:
    """A projection's row of the module table; `PLAIN` where it has none.

    A matrix whose rows do not consist of whole groups is in INT8. Projections of few outputs keep their dtype.

    Args:
        projection: to store.
        rank: of its factors; None if it is not factored.
        storage: of its matrices.
    """
    plain = PLAIN if rank is None else FactoredModule(rank, storage.form)
    scheme = storage.scheme
    if scheme is None or projection.out_features < LEAST_OUTPUTS:
        return plain
    shapes = plain.shapes(projection.out_features, projection.in_features)
    fits = {suffix: scheme.fits(shapes[suffix][1]) for suffix in plain.matrices}
    return replace(plain, schemes={suffix: scheme if fit else INT8 for suffix, fit in fits.items()})


def module_table(
    projections: Iterable[Projection], ranks: Mapping[str, int], storage: Storage
) -> dict[str, FactoredModule]:
    """The module table of projections of which some have ranks and which are all stored alike."""
    found = {p.name: module_of(p, ranks.get(p.name), storage) for p in projections}
    return {name: module for name, module in found.items() if module != PLAIN}


def bits_per_weight(
    projections: Iterable[Projection], modules: Mapping[str, FactoredModule], itemsizes: Mapping[str, int]
) -> float:
    """Stored bits of projections for each element of their dense weights.

    Args:
        projections: all of them, those without a row of the table included.
        modules: the table.
        itemsizes: projection -> bytes of an element of its matrices that are not quantized.
    """
    total = elements = 0
    for p in projections:
        total += modules.get(p.name, PLAIN).nbytes(p.out_features, p.in_features, itemsizes[p.name])
        elements += p.numel
    return 8 * total / elements


def size(projection: Projection, rank: int | None, form: str) -> int:
    """Elements stored for a projection of a given rank and form, pivots included; a rank of None is dense."""
    if rank is None:
        return projection.numel
    return stored_size(form, projection.out_features, projection.in_features, rank)


def saves(projection: Projection, rank: int, form: str) -> bool:
    """Whether a rank stores fewer elements than the dense weight, and is valid in the form."""
    fits = form != "pivot" or rank < projection.out_features
    return fits and size(projection, rank, form) < projection.numel


def rank_step(projection: Projection, storage: Storage) -> int:
    """The number of which a projection's ranks are multiples: a tile, or the groups of its quantized up factor."""
    smaller = min(projection.out_features, projection.in_features)
    group = None if storage.scheme is None else storage.scheme.group_size
    if group is not None:
        return WIDE_MULTIPLE if smaller >= WIDE_FROM else group
    return RANK_MULTIPLE if smaller >= ROUND_FROM else 1


def hardware_rank(projection: Projection, rank: int, storage: Storage) -> int:
    """The rank, rounded up to a multiple of `rank_step`."""
    step = rank_step(projection, storage)
    return -(-rank // step) * step
