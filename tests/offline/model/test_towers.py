"""Models of several towers: layer-wise activations and gradients equal those of the whole model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.loss import batch_seed
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.image_text import load_processor, read_pairs
from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.draw import draw
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model
from tests.offline.calibration.test_gram import CPU, clipped
from tests.offline.test_compress import section_of
from tests.offline.whole import each, error_aware, layer_gradients, started_gradients

SEED = 7
# A dual encoder, a model that uses a layer before the last one, a model whose images have no batch dimension, one more
# whose projector, as that of Qwen2-VL, merges four tokens into one, and one that adds between its language layers.
TESTED = ("CLIP", "LLaVA 1.5", "Qwen2-VL", "Idefics 3, SmolVLM", "Qwen3-VL")


@pytest.fixture(scope="module", params=TESTED)
def vision_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSource, list[Batch]]:
    folder = tmp_path_factory.mktemp("vision")
    row = next(row for row in VISION_MODELS if row.name == request.param)
    model = save_vision_model(row, folder / "model")
    pairs = read_pairs(
        str(save_pairs(folder / "pairs", 12)), 12, 0, load_processor(model), 64 if row.compares else None
    )
    return ModelSource(model), pairs.batches


def whole_model(source: ModelSource, batches: list[Batch]) -> dict[str, dict[str, np.ndarray]]:
    """Projection -> its clipped inputs [tokens, in] and the loss gradients at its outputs [tokens, out]."""
    model = source.auto_class.from_pretrained(source.folder, dtype=torch.float32).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    for p in (p for row in find_projections(source).layers for p in row):

        def keep(_m: Any, args: Any, output: torch.Tensor, name: str = p.name) -> None:
            if output.requires_grad:
                output.retain_grad()
            inputs.setdefault(name, []).append(args[0].detach())
            outputs.setdefault(name, []).append(output)

        model.get_submodule(p.path).register_forward_hook(keep)
    found = [model(**batch) for batch in batches]
    if source.is_dual_encoder:
        texts, images = (torch.cat([one[name] for one in found]) for name in ("text_embeds", "image_embeds"))
        logits = texts @ images.T * model.logit_scale.exp()
        parts, generators = [logits, logits.T], [torch.Generator().manual_seed(SEED)] * 2
    else:
        given = source.config.image_token_id
        following = [torch.cat([b["input_ids"][:, 1:], torch.tensor([[-1]])], 1)[0] for b in batches]
        parts = [one.logits[0][after != given] for one, after in zip(found, following, strict=True)]
        generators = [torch.Generator().manual_seed(batch_seed(SEED, n)) for n in range(len(batches))]
    losses, terms = [], 0
    for part, generator in zip(parts, generators, strict=True):
        shares = part.detach().softmax(-1)
        labels = draw(shares, torch.rand(len(shares), generator=generator))
        losses.append(F.cross_entropy(part, labels, reduction="sum"))
        terms += len(part)
    torch.stack(losses).sum().backward()
    result: dict[str, Any] = {"terms": terms}
    for name, values in outputs.items():
        x = np.concatenate([clipped(one.reshape(-1, *one.shape[-2:]).double().numpy()) for one in inputs[name]])
        grads = [v.grad if v.grad is not None else torch.zeros_like(v) for v in values]
        result[name] = (x, np.concatenate([g.flatten(0, -2).double().numpy() for g in grads]))
    return result


def test_grams_and_gradients_equal_those_of_the_whole_model(
    vision_model: tuple[ModelSource, list[Batch]], tmp_path: Path, one_thread: None
) -> None:
    source, batches = vision_model
    rows = find_projections(source).layers
    executor, layers = started_gradients(source, batches, SEED)
    grams: dict[str, tuple[torch.Tensor, int]] = {}
    seen: dict[str, int] = {}
    for row, one in zip(rows, layers, strict=True):
        sums = {name: total.matrix() for name, total in one.sums.items()}
        grams |= {p.name: (sums[one.leader[p.name]], one.counts[one.leader[p.name]]) for p in row}
        seen |= {p.name: one.tokens for p in row}
    stream, losses = executor.worker.shard.stream, executor.call("losses")[0]
    last = max(end for end in stream.read if end in source.spans[0])
    moments: dict[str, torch.Tensor] = {}
    for index in reversed(range(len(rows))):
        row = rows[index] if index <= last or index not in source.spans[0] else []
        result = layer_gradients(executor, index, row)
        moments |= {name: one.moments(result.tokens, losses)[0] for name, one in result.sums.items()}

    expected = whole_model(source, batches)
    assert losses == expected.pop("terms")
    assert grams.keys() == expected.keys()
    for name, (x, g) in expected.items():
        gram, tokens = grams[name]
        assert tokens == len(x) == len(g)
        np.testing.assert_allclose(gram.numpy(), x.T @ x, atol=1e-4 * np.abs(x.T @ x).max())
        if name in moments:
            moment = g.T @ g / losses * (seen[name] / tokens)
            assert np.abs(moment).max() > 0
            np.testing.assert_allclose(moments[name].numpy(), moment, atol=2e-3 * np.abs(moment).max())
        else:
            assert not g.any(), "the loss depends on its output"


def test_the_factored_flow_crosses_towers(vision_model: tuple[ModelSource, list[Batch]], one_thread: None) -> None:
    """The factored hidden states equal those of a model with the reconstructed weights."""
    source, batches = vision_model
    fit, shard = error_aware(source, batches)
    weights = {
        p.name: source.weights.tensor(f"{p.path}.weight") * (0.8 + 0.1 * (i % 3))
        for i, p in enumerate(p for row in find_projections(source).layers for p in row)
    }
    for index, row in enumerate(find_projections(source).layers):
        known = {p.name: weights[p.name] for p in row}
        list(fit.advance(index, [[p] for p in row], set(known), each(lambda *_: pytest.fail("fitted")), known))

    model = source.auto_class.from_pretrained(source.folder, dtype=torch.float32).eval()
    for p in (p for row in find_projections(source).layers for p in row):
        model.get_submodule(p.path).weight.data.copy_(weights[p.name])
    stream = shard.stream
    with torch.no_grad():
        for number, batch in enumerate(batches):
            expected, found = model(**batch), stream.output(number, shard.factored.kept[number])
            for name in ("text_embeds", "image_embeds") if source.is_dual_encoder else ("logits",):
                if name == "logits":  # the LM head is not loaded yet
                    source.load_lm_head(CPU, torch.float32)
                    found = stream.output(number, shard.factored.kept[number])
                torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
            dense = stream.output(number, stream.flow.kept[number])
            assert not torch.allclose(dense[name], expected[name], atol=1e-3)


def options(folder: Path, name: str, **more: Any) -> CompressOptions:
    row = next(row for row in VISION_MODELS if row.name == name)
    model = save_vision_model(row, folder / "model")
    pairs = str(save_pairs(folder / "pairs", 64))
    return CompressOptions(str(model), folder / "out", **{"dataset": (pairs,), **more})


@pytest.mark.parametrize("sensitivity", ["measured", "uniform", "forward"])
def test_each_tower_reaches_its_ratio(tmp_path: Path, sensitivity: str, one_thread: None) -> None:
    ratios = {"vision": 0.2, "projector": 0.3, "language": 0.4}
    requested = options(tmp_path, "LLaVA 1.5", ratio=ratios, sensitivity=sensitivity)
    result = compress(requested)
    section = section_of(result.output)
    for tower, ratio in ratios.items():
        own = {p.name: p for row in make_plan(replaced(requested)).projections.layers for p in row if p.tower == tower}
        kept = sum(p.numel for name, p in own.items() if name not in section["modules"])
        kept += sum(stored(result.output, name) for name in own if name in section["modules"])
        assert 1 - kept / sum(p.numel for p in own.values()) == pytest.approx(ratio, abs=0.03)
    assert set(section["tolerance"]) == (set(ratios) if sensitivity == "uniform" else set())


def replaced(requested: CompressOptions) -> CompressOptions:
    return CompressOptions(requested.model, requested.output.with_name("other"), dataset=requested.dataset)


def stored(folder: Path, name: str) -> int:
    from pgsvd_vllm.format.reader import open_checkpoint

    checkpoint = open_checkpoint(folder)
    suffixes = [suffix for suffix in checkpoint.modules[name].suffixes if suffix != "pivots"]
    return sum(checkpoint.tensors[f"{name}.{suffix}"].numel for suffix in suffixes)


def test_towers_that_are_not_named_stay_dense(tmp_path: Path, one_thread: None) -> None:
    result = compress(options(tmp_path, "CLIP", tolerance={"vision": 0.3}))
    assert result.choice.allocation.tolerances == {"vision": 0.3}
    assert {name.partition("_")[0] for name in result.choice.allocation.ranks} == {"vision"}


def test_text_alone_compresses_only_the_language_model(tmp_path: Path, one_thread: None) -> None:
    requested = options(tmp_path, "LLaVA 1.5", dataset=("python-docs",), num_calibration_samples=8, max_seq_length=64)
    plan = make_plan(requested)
    assert plan.projections.towers == ["language"]
    assert {p.tower for p in plan.projections.unused} == {"vision", "projector"}
    assert compress(requested).choice.allocation.ranks


def test_a_projector_that_few_tokens_reach_stays_dense(tmp_path: Path, one_thread: None) -> None:
    """64 images give 256 tokens after the merge of four into one; the projector has 384 inputs."""
    requested = options(tmp_path, "Idefics 3, SmolVLM")
    lines: list[str] = []
    result = compress(requested, lines.append)
    name = "model.connector.modality_projection.proj"
    assert any(f"{name} (256 of 384)" in line for line in lines)
    assert name not in result.choice.allocation.ranks
    report = json.loads((result.output / "pgsvd_report.json").read_text(encoding="utf-8"))
    assert report["tokens"] == {name: 256}
    with pytest.raises(InputError, match=rf"`ratio` projector=.*{name} \(256 of 384\)"):
        compress(replace(requested, output=tmp_path / "other", ratio={"projector": 0.3}))


def test_texts_and_pairs_can_be_mixed(tmp_path: Path, one_thread: None) -> None:
    requested = options(tmp_path, "Qwen2-VL", num_calibration_samples=24, max_seq_length=64)
    both = (*requested.dataset, "python-docs")
    plan = make_plan(
        CompressOptions(requested.model, requested.output, dataset=both, num_calibration_samples=24, max_seq_length=64)
    )
    assert plan.data.pairs is not None
    assert (plan.data.pairs.count, len(plan.data.windows.ids)) == (12, 12)
    assert compress(plan.options).choice.allocation.ranks
