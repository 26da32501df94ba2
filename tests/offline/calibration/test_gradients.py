"""Measured sensitivities against autograd over the whole model, and ranks against brute force."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.latency_table import LatencyTable, ShapeLatencies
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.offline.calibration import loss
from pgsvd_vllm.offline.calibration.gradients import GradientSums, _GradientHooks
from pgsvd_vllm.offline.calibration.loss_metric import DAMPING, metric_root, weighted_gram
from pgsvd_vllm.offline.factors.solvers import closed_form
from pgsvd_vllm.offline.factors.stored_form import stored_form
from pgsvd_vllm.offline.linalg import gram_root, output_energy
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.draw import draw
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.pareto import loss_front
from pgsvd_vllm.offline.ranks.stored import saves
from pgsvd_vllm.offline.ranks.target import RankTarget
from pgsvd_vllm.offline.settings import Storage
from tests.conftest import save_tiny_model
from tests.offline.calibration.test_gram import clipped, reference_inputs
from tests.offline.whole import layer_gradients, started_gradients


@pytest.mark.parametrize("tie", [True, False])
def test_layerwise_gradients_equal_those_of_the_whole_model(
    tmp_path: Path, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "TOKENS_PER_CHUNK", 10)
    folder = save_tiny_model(tmp_path / "model", tie=tie, bias=not tie, layers=3, seed=2)
    ids = torch.randint(2, 258, (5, 33), generator=torch.Generator().manual_seed(3))
    source = ModelSource(folder)
    rows = find_projections(source).layers
    executor, _ = started_gradients(source, text_batches(ids), seed=7)
    moments: dict[str, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    for index in reversed(range(3)):
        found = layer_gradients(executor, index, rows[index])
        assert found.tokens == ids.numel() == executor.call("losses")[0]
        for name, sums in found.sums.items():
            moments[name], grams[name] = sums.moments(found.tokens, ids.numel())

    model = AutoModelForCausalLM.from_pretrained(folder)
    outputs: dict[str, torch.Tensor] = {}
    for row in rows:
        for p in row:

            def keep(_m: torch.nn.Module, _i: tuple, output: torch.Tensor, name: str = p.name) -> None:
                output.retain_grad()
                outputs[name] = output

            model.get_submodule(p.name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(loss.batch_seed(7, 0))
    gradient: dict[str, list[np.ndarray]] = {p.name: [] for row in rows for p in row}
    for window in ids:
        logits = model(input_ids=window[None]).logits[0].float()
        shares = logits.detach().softmax(-1)
        labels = draw(shares, torch.rand(len(shares), generator=generator))
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for name, output in outputs.items():
            assert output.grad is not None
            gradient[name].append(output.grad[0].double().numpy())
    inputs = reference_inputs(folder, ids)
    assert moments.keys() == grams.keys() == gradient.keys()
    for name, parts in gradient.items():
        g, x = np.concatenate(parts), clipped(inputs[name])
        weights = np.square(g).sum(1, keepdims=True) / np.square(g).sum(1).mean()
        assert weights.max() > 1.5 > 0.7 > weights.min(), "all tokens have the same weight: nothing was tested"
        # Two float32 passes with different orders of summation: rounding relative to the largest entry.
        for found_one, sums in ((moments[name], g.T @ g), (grams[name], x.T @ (x * weights))):
            expected = sums / ids.numel()
            np.testing.assert_allclose(found_one.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert not list(executor.worker.shard.gradients.folder.iterdir())


def test_moments_of_a_moe_expert_count_its_share_of_tokens() -> None:
    module = torch.nn.Linear(5, 3)
    hooks = _GradientHooks({"expert": module})
    x, g = torch.randn(6, 5), torch.randn(6, 3)
    module(x.requires_grad_()).backward(g)
    (found,) = hooks.take(block=0).sums.values()
    hooks.remove()
    moment, gram = found.moments(tokens=24, losses=24)
    x, g = clipped(x.detach().double().numpy()[None]), g.double().numpy()
    weights = np.square(g).sum(1, keepdims=True) / np.square(g).sum(1).mean()
    np.testing.assert_allclose(moment.numpy(), g.T @ g / 6, atol=1e-5)
    np.testing.assert_allclose(gram.numpy(), x.T @ (x * weights) / 24, atol=1e-5)


def test_a_projection_that_no_token_reaches_is_named() -> None:
    found, projections = GradientSums(tokens=24), [Projection("up_proj", 3, 5), Projection("expert", 3, 5, reach=0.5)]
    with pytest.raises(InputError, match=r"up_proj: none of the first 24 calibration tokens"):
        found.reached(projections)
    assert found.reached(projections[1:]) == []


def test_moments_are_zero_without_any_gradient() -> None:
    module = torch.nn.Linear(5, 3)
    hooks = _GradientHooks({"p": module})
    module(torch.randn(6, 5, requires_grad=True)).backward(torch.zeros(6, 3))
    moment, gram = hooks.take(block=0).sums["p"].moments(tokens=6, losses=6)
    assert not moment.any()
    assert not gram.any()


def test_weighted_gram_averages_plain_and_weighted_moments() -> None:
    a, b = (torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)) * f for f in (10, 1))
    assert torch.equal(weighted_gram(a, 10, b), b)
    assert torch.equal(weighted_gram(a, 5, 0 * b), b)
    assert torch.equal(weighted_gram(a, 10, b, 0.5), b + 0.5 * 3 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(("m", "n"), [(23, 31), (31, 23), (17, 17)])
def test_the_metric_predicts_the_loss_of_a_quadratic_model(m: int, n: int) -> None:
    """For the loss 0.5 sum_t ||L^T dW x_t||^2 the prediction is exact and no other factors have a smaller loss."""
    rng = np.random.default_rng(m * n)
    w, x, g = rng.normal(size=(m, n)), rng.normal(size=(n, 400)), rng.normal(size=(m, m // 2))
    gram, moment = torch.from_numpy(x @ x.T / 400), torch.from_numpy(g @ g.T)
    root = metric_root(moment)
    damped = moment.numpy() + DAMPING * np.trace(moment.numpy()) / m * np.eye(m)
    np.testing.assert_allclose((root @ root.T).numpy(), damped, atol=1e-12 * np.abs(damped).max())

    def loss(approximation: np.ndarray) -> float:
        change = (w - approximation) @ x
        return 0.5 * float(np.sum(change * (damped @ change))) / 400

    energy = output_energy(root.T @ torch.from_numpy(w), gram, gram_root(gram)).numpy()
    for rank in (1, 5, min(m, n) - 1):
        factors = closed_form(torch.from_numpy(w), gram, rank, root)
        best = loss(factors.u.numpy() @ factors.v.numpy())
        assert best == pytest.approx(0.5 * energy[rank:].sum(), rel=1e-8)
        plain = closed_form(torch.from_numpy(w), gram, rank)
        assert best <= loss(plain.u.numpy() @ plain.v.numpy())
        for _ in range(30):
            u = factors.u.numpy() + 0.01 * rng.normal(size=(m, rank))
            v = factors.v.numpy() + 0.01 * rng.normal(size=(rank, n))
            assert loss(u @ v) >= best
        stored = stored_form(factors, torch.from_numpy(w), gram, "factors", torch.bfloat16, root)
        naive = factors.u.bfloat16().double() @ factors.v.bfloat16().double()
        assert best <= loss(reconstruct(stored).numpy()) <= loss(naive.numpy())


def random_latencies(projections: list[Projection], rng: np.random.Generator) -> LatencyTable:
    """Latencies that do not rise with the rank and often exceed the dense one."""
    shapes = {}
    for p in projections:
        forms = {
            form: [(rank, float(rng.uniform(0.2, 1.6)) * p.numel) for rank in range(1, 15)]
            for form in ("factors", "pivot")
        }
        shapes[p.out_features, p.in_features] = ShapeLatencies(float(p.numel), forms)
    return LatencyTable(shapes, 1, "bfloat16", "a test machine")


@pytest.mark.parametrize("by_latency", [False, True], ids=["size", "latency"])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_ranks_by_loss_are_optimal_against_brute_force(form: str, by_latency: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = [(12, 9), (7, 14), (10, 10)]
    projections = [Projection(f"p{i}", m, n) for i, (m, n) in enumerate(shapes)]
    energies = {
        p.name: torch.from_numpy(np.sort(rng.exponential(size=min(m, n)) ** 3 * 10 ** rng.uniform(-1, 1))[::-1].copy())
        for p, (m, n) in zip(projections, shapes, strict=True)
    }
    table = random_latencies(projections, rng) if by_latency else None
    total = sum(p.numel for p in projections)

    def outcome(ranks: dict[str, int]) -> tuple[float, float, int]:
        """Cost, loss and stored elements."""
        cost, loss, elements = 0.0, 0.0, 0
        for p in projections:
            rank = ranks.get(p.name)
            plain = 0 if rank is None else rank * (p.out_features + p.in_features)
            # The pivot form stores rank^2 elements less and `rank` pivots.
            stored = plain if form == "factors" or rank is None else plain - rank * rank + rank
            stored = p.numel if rank is None else stored
            elements += stored
            if table is None:
                cost += stored
            else:
                latencies = table.shapes[p.out_features, p.in_features]
                cost += latencies.dense if rank is None else dict(latencies.forms[form])[rank]
            loss += 0.0 if rank is None else 0.5 * float(energies[p.name][rank:].sum())
        return cost, loss, elements

    def pays(p: Projection, rank: int) -> bool:
        """Whether a rank saves at least a tenth of the projection's cost."""
        dense, low_rank = outcome({})[0], outcome({p.name: rank})[0]
        return saves(p, rank, form) and dense - low_rank >= 0.1 * p.numel - 1e-9

    options = [[None, *(r for r in range(1, 15) if pays(p, r))] for p in projections]
    every = [
        outcome({p.name: r for p, r in zip(projections, combination, strict=True) if r is not None})[:2]
        for combination in itertools.product(*options)
    ]
    front = loss_front(projections, energies, RankTarget(None, None, (Storage(form),), latencies=table))
    assert len(front.removed) == len(front.losses) == len(front.parameters) == len(front.steps) + 1 > 5
    slopes = []
    for i in range(1, len(front.removed)):
        modules = {name: module for step in front.steps[:i] for name, module in step.items()}
        cost, loss, elements = outcome({name: module.rank for name, module in modules.items()})
        assert front.removed[i] == pytest.approx(1 - cost / total)
        assert front.losses[i] == pytest.approx(loss)
        assert front.parameters[i] == pytest.approx(1 - elements / total)
        # No combination of ranks with the same or less cost has a smaller loss.
        assert loss <= min(other for c, other in every if c <= cost + 1e-9) + 1e-12
        slopes.append((front.losses[i] - front.losses[i - 1]) / (front.removed[i] - front.removed[i - 1]))
    assert slopes == sorted(slopes)
    for cost, loss in every:  # no combination lies below the line between two corners
        share = 1 - cost / total
        after = next((i for i, r in enumerate(front.removed) if r >= share), None)
        if share > 0 and after is not None:
            (r0, r1), (l0, l1) = front.removed[after - 1 : after + 1], front.losses[after - 1 : after + 1]
            assert loss >= l0 + (l1 - l0) * (share - r0) / (r1 - r0) - 1e-9
    for ratio in (0.1, 0.2, 0.35, 0.5, 0.65)[1 if by_latency else 0 : 3 if by_latency else 5]:
        allocation = front.at(ratio)
        closest = min(range(1, len(front.removed)), key=lambda i: abs(front.removed[i] - ratio))
        assert allocation.removed == front.parameters[closest]
        assert allocation.latency_removed == (front.removed[closest] if by_latency else None)
        assert allocation.loss == front.losses[closest]
        assert outcome(allocation.ranks)[1] == pytest.approx(allocation.loss)


def test_a_ratio_beyond_the_front_is_refused() -> None:
    projection, target = Projection("p", 8, 8), RankTarget(None, None, (Storage("factors"),))
    with pytest.raises(InputError, match=r"`ratio` 0\.9: more than this model can give"):
        loss_front([projection], {"p": torch.ones(8, dtype=torch.float64)}, target).at(0.9)


def test_batches_draw_different_labels() -> None:
    """A generator on a CPU ignores all but 32 bits of its seed."""
    draws = [
        torch.rand(4, generator=torch.Generator().manual_seed(loss.batch_seed(seed, number)))
        for seed, number in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len({tuple(one.tolist()) for one in draws}) == 4
