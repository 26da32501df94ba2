"""Computes the latency table of a model for a GPU that is not at hand (see `kernels.gpu_cost`)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import mean

from pgsvd_vllm.format.latency_table import LatencyTable, ShapeLatencies, ranks_of_table
from pgsvd_vllm.format.schema import FORMS, stored_size
from pgsvd_vllm.kernels.gpu_cost import GPUS, dense, factored
from pgsvd_vllm.kernels.layer_shape import ShardShape
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.parallel.layer_grouping import merged_names

Shape = tuple[int, int]


def computed_latencies(name: str, projections: Sequence[Projection], tokens: int, dtype: str) -> LatencyTable:
    """The table of a model.

    vLLM merges some projections into one layer, whose fixed time they share. A projection's latency is its share of the
    layer's, by its numbers, where all projections of the layer have the same share of their largest rank; a shape's is
    the mean over the projections that have it.

    Args:
        name: of the GPU.
        projections: of the model.
        tokens: of each GEMM.
        dtype: of 16 bits.
    """
    gpu, by_path = GPUS[name], {p.path: p for p in projections}
    merged = {tuple(one for one in merged_names(path) if one in by_path) for path in by_path}
    # Layers of the same sizes are computed once.
    layers = Counter(
        (tuple(by_path[path].out_features for path in paths), by_path[paths[0]].in_features) for paths in merged
    )
    times: dict[Shape, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for (outs, columns), count in layers.items():
        whole = dense(gpu, tokens, outs, columns)
        for out in outs:
            found = times[out, columns]
            found["dense", 0] += count * [whole * out / sum(outs)]
            for form in FORMS:
                for rank in ranks_of_table(form, out, columns):
                    shards = _alike(form, outs, columns, rank / ranks_of_table(form, out, columns)[-1])
                    numbers = sum(stored_size(form, shard.out, columns, shard.rank or 0) for shard in shards)
                    time = factored(gpu, tokens, shards, columns)
                    found[form, rank] += count * [time * stored_size(form, out, columns, rank) / numbers]
    shapes = {}
    for shape, found in times.items():
        latencies = {key: round(mean(values), 2) for key, values in found.items()}
        forms = {form: [(rank, latencies[form, rank]) for rank in ranks_of_table(form, *shape)] for form in FORMS}
        shapes[shape] = ShapeLatencies(latencies["dense", 0], forms)
    return LatencyTable(dict(sorted(shapes.items())), tokens, dtype, f"NVIDIA {name}, computed", "gpu")


def _alike(form: str, outs: Sequence[int], columns: int, share: float) -> list[ShardShape]:
    """The shards of a layer, each with the same share of its largest rank; 1 where no rank saves memory."""
    ranks = [max(1, round(share * max(ranks_of_table(form, out, columns), default=1))) for out in outs]
    return [ShardShape(out, r, r if form == "pivot" else None) for out, r in zip(outs, ranks, strict=True)]
