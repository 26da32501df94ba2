"""However the samples are shared out, calibration and factors have the same bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pgsvd_vllm.offline.compress import calibrate, choose, store_layers
from pgsvd_vllm.offline.executor.executor import Executor, shares_of
from pgsvd_vllm.offline.executor.worker import Worker
from pgsvd_vllm.offline.model import batch as batching
from pgsvd_vllm.offline.model.batch import BLOCKS, Batch
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from tests.conftest import save_tiny_model
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model

SMALL: dict[str, Any] = {"max_seq_length": 48, "refine": 0, "ratio": 0.4}


class SplitExecutor:
    """Several workers in this process, each with a model of its own."""

    is_local = False

    def __init__(self, plan: Plan, count: int) -> None:
        settings = plan.settings
        self.workers = [
            Worker(ModelSource(plan.source.folder), settings.device, settings.compute_dtype) for _ in range(count)
        ]
        self.active: list[Worker] = []

    def begin(self, shard: Any, batches: Sequence[Batch], *arguments: Any) -> None:
        shares = shares_of(batches, len(self.workers))
        self.active = [self.workers[i] for i in shares]
        for worker, share in zip(self.active, shares.values(), strict=True):
            worker.begin(shard, share, *arguments)

    def end(self) -> None:
        for worker in self.active:
            worker.end()

    def tell(self, method: str, *arguments: Any) -> None:
        self.call(method, *arguments)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [worker.call(method, *arguments) for worker in self.active]

    def streams(self, method: str, *arguments: Any) -> list[Iterator[Any]]:
        return [worker.stream(method, *arguments) for worker in self.active]

    def map(self, function: Any, items: Iterable[Any], shared: Any = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            yield self.workers[number % len(self.workers)].apply(function, item, shared)

    def retry(self, stage: Callable[[], Any]) -> Any:
        return stage()


def results(plan: Plan, executor: Executor | None) -> dict[str, torch.Tensor]:
    """All tensors of the run's state."""
    state = open_state(plan)
    calibrate(plan, state, executor)
    store_layers(plan, state, choose(plan, state, print).allocation.modules, print, executor)
    found: dict[str, torch.Tensor] = {}
    for index in range(len(plan.projections.layers)):
        layer, measured = state.load_layer(index), state.load_sensitivity(index, "measured")
        for kind, matrices in (("C", layer.grams), ("G", measured.moments), ("C_w", measured.grams)):
            found |= {f"{kind} {name}": matrix.double() for name, matrix in matrices.items()}
        found |= {f"loss {name}": energy for name, energy in measured.energy.items()}
        for name, tensors in state.load_factors(index).tensors.items():
            found |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if plan.projections.lm_head is not None:
        found |= {f"head {name}": tensor for name, tensor in vars(state.load_lm_head()).items()}
    state.close()
    return found


@pytest.mark.parametrize("kind", ["text", "CLIP", "LLaVA 1.5"])
def test_shares_of_the_samples_give_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    if kind == "text":
        monkeypatch.setattr(batching, "TOKENS_PER_BATCH", 3 * 48)
        model, more = save_tiny_model(tmp_path / "model", tie=False), {"include": ("lm_head",)}
        data, count = ("python-docs",), 42
    else:
        model = save_vision_model(next(row for row in VISION_MODELS if row.name == kind), tmp_path / "model")
        data, count, more = (str(save_pairs(tmp_path / "pairs", 24)),), 24, {}
    expected: dict[str, torch.Tensor] = {}
    for workers in (1, 3, BLOCKS):
        options = CompressOptions(
            str(model), tmp_path / f"{workers}", dataset=data, num_calibration_samples=count, **more, **SMALL
        )

        plan = make_plan(options)
        assert len(plan.data.batches()) > 3
        found = results(plan, None if workers == 1 else SplitExecutor(plan, workers))
        if workers == 1:
            expected = found
            assert len(expected) > 40
            continue
        assert found.keys() == expected.keys()
        different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
        assert different == []
