"""Parts of the pipeline in this process, over whole streams, as tests need them."""

from collections.abc import Callable, Iterable, Sequence

import torch

from pgsvd_vllm.offline.calibration.collect import start_contrastive
from pgsvd_vllm.offline.calibration.gradients import GradientSums, gradient_batches
from pgsvd_vllm.offline.calibration.gram import LayerGrams, advance
from pgsvd_vllm.offline.calibration.shard import CalibrationShard
from pgsvd_vllm.offline.executor.executor import LocalExecutor, combined
from pgsvd_vllm.offline.factors.error_aware import ErrorAwarePass, Fit, Target
from pgsvd_vllm.offline.factors.shard import FitShard
from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource


def layer_grams(stream: LayerStream, index: int, row: Sequence[Projection], tokens: int | None = None) -> LayerGrams:
    """Run a layer and sum its Gram matrices; `tokens` must be those that it reports."""
    *steps, found = combined([advance(stream, index, row, collect=True)], LayerGrams())
    assert isinstance(found, LayerGrams)
    assert tokens is None or sum(step for step in steps if isinstance(step, int)) == tokens
    return found


def started_gradients(
    source: ModelSource, batches: Sequence[Batch], seed: int
) -> tuple[LocalExecutor, list[LayerGrams]]:
    """An executor whose calibration shard has run all layers forward and begun the backward pass."""

    executor = LocalExecutor(source, torch.device("cpu"), torch.float32)
    executor.begin(CalibrationShard, batches, None)
    executor.call("measure_gradients", gradient_batches(executor.call("batch_tokens")[0]))
    found = []
    for index, row in enumerate(find_projections(source).layers):
        *_, grams = combined(executor.streams("advance", index, row, True), LayerGrams())
        assert isinstance(grams, LayerGrams)
        found.append(grams)
    if source.is_dual_encoder:
        start_contrastive(executor, source, seed)
    else:
        assert sum(executor.streams("start", seed)[0]) == sum(batch["input_ids"].numel() for batch in batches)
    return executor, found


def layer_gradients(executor: LocalExecutor, index: int, row: Sequence[Projection]) -> GradientSums:
    """Run a layer backward."""
    *steps, found = combined(executor.streams("retreat", index, row), GradientSums())
    assert isinstance(found, GradientSums)
    assert sum(step for step in steps if isinstance(step, int)) == found.tokens
    return found


def error_aware(
    source: ModelSource, batches: Sequence[Batch], all_tokens: bool = False
) -> tuple[ErrorAwarePass, FitShard]:
    """An error-aware fit and its shard."""
    executor = LocalExecutor(source, torch.device("cpu"), torch.float32)
    fit_pass = ErrorAwarePass(executor, batches, torch.device("cpu"), torch.float32, all_tokens)
    return fit_pass, executor.worker.shard


def each(fit: Callable[[Projection, Target], torch.Tensor]) -> Fit:
    """A fit of one projection after the other."""

    def fit_all(projections: Sequence[Projection], target: Target | None) -> Iterable[torch.Tensor]:
        for p in projections:
            yield fit(p, target)  # type: ignore[arg-type]

    return fit_all
