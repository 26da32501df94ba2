"""Knowledge distillation on a tiny model: gradients, selection by held-out windows, never a worse result."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.lowrank import pivot_weight, reconstruct
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import HELD_OUT, CompressOptions, Dose
from pgsvd_vllm.offline.planning.memory import stage_bytes
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.resources import estimate
from pgsvd_vllm.offline.refine import distill as refine
from pgsvd_vllm.offline.refine.distill import Distiller, Tensors
from pgsvd_vllm.offline.refine.trained import TrainedProjection
from tests.offline.calibration.test_gram import CPU, windows

OPTIONS: dict[str, Any] = {"ratio": 0.5, "num_calibration_samples": 24, "max_seq_length": 64}


def factors_of(folder: Path, form: str, share: float = 0.25) -> Tensors:
    """Truncated-SVD factors of every projection at a share of its full rank."""
    found: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        rank = int(share * len(s))
        down, up = s[:rank, None] * vh[:rank], u[:, :rank]
        if form == "factors":
            found[name.removesuffix(".weight")] = {"weight_v": down, "weight_u": up.contiguous()}
            continue
        order = torch.arange(len(up))
        pivots, others = order[:rank], order[rank:]
        found[name.removesuffix(".weight")] = {
            "weight_p": (up @ down)[pivots],
            "weight_c": torch.linalg.lstsq(up[pivots].T, up[others].T).solution.T.contiguous(),
            "pivots": pivots.int(),
        }
    return found


def count_time_by_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Advance the clock by `seconds` per training step, independent of the machine's speed."""
    now, learn = 0.0, Distiller.learn

    def timed(self: Distiller, *arguments: Any) -> None:
        nonlocal now
        now += seconds
        learn(self, *arguments)

    monkeypatch.setattr(Distiller, "learn", timed)
    monkeypatch.setattr(refine, "time", SimpleNamespace(monotonic=lambda: now))


def load_dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distiller(folder: Path, tensors: Tensors) -> Distiller:
    return Distiller(load_dense(folder), load_dense(folder), "model.layers", tensors, {})


def divergence_of(folder: Path, tensors: Tensors, held_out: torch.Tensor) -> float:
    """KL(dense || compressed) in float64, from two dense models and reconstructed weights."""
    dense, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    for name, row in tensors.items():
        exact = {suffix: tensor.double() if tensor.is_floating_point() else tensor for suffix, tensor in row.items()}
        other.get_submodule(name).weight.data.copy_(reconstruct(exact))
    with torch.no_grad():
        p, q = (model(input_ids=held_out).logits.log_softmax(-1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_trained_projection_matches_the_dense_gradients(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    p, c = torch.randn(5, 11, generator=generator), torch.randn(8, 5, generator=generator)
    pivots = torch.tensor([1, 4, 5, 9, 12], dtype=torch.int32)
    bias = nn.Parameter(torch.randn(13, generator=generator)) if with_bias else None
    module = TrainedProjection({"weight_p": p, "weight_c": c, "pivots": pivots}, bias, CPU)
    x, target = torch.randn(2, 3, 11, generator=generator), torch.randn(2, 3, 13, generator=generator)
    (module(x) * target).sum().backward()

    exact = [t.double().requires_grad_() for t in (p, c)]
    y = x.double() @ pivot_weight(exact[0], exact[1], pivots).T + (0 if bias is None else bias.double())
    (y * target.double()).sum().backward()
    torch.testing.assert_close(module(x).double(), y, atol=1e-5, rtol=1e-5)
    for found, expected in zip((module.down, module.up), exact, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_training_does_not_depend_on_the_size_of_the_weights(form: str) -> None:
    """Adam's steps have the size of the rate alone: weights a sixteenth as large must not change sixteen times as much.

    Outputs of the smaller layer are a sixteenth; its loss and its changes are compared in that unit.
    """
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(64, width, generator=generator) for width in (24, 40))
    names = ("weight_v", "weight_u") if form == "factors" else ("weight_p", "weight_c")
    down, up = (
        torch.randn(8, 24, generator=generator),
        torch.randn(40 if form == "factors" else 32, 8, generator=generator),
    )
    found = []
    for size in (1.0, 1 / 16):
        tensors = {names[0]: down * size, names[1]: up}
        if form == "pivot":
            tensors["pivots"] = torch.arange(0, 40, 5, dtype=torch.int32)
        module = TrainedProjection(tensors, None, CPU)
        optimisers = [torch.optim.Adam([parameter], lr=100 * rate) for parameter, rate in module.rates]
        for _ in range(20):
            (module(x) / size - target).square().mean().backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        found.append([(module.down / size).detach(), module.up.detach()])
    assert all(
        (after - before).norm() > 0.1 * before.norm() for after, before in zip(found[0], (down, up), strict=True)
    )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_gradients_of_a_window_are_those_of_its_pieces(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(refine, "PIECE", 16)
    monkeypatch.setattr(refine, "TOKENS_PER_CHUNK", 6)
    row = windows(1, 32)[0]
    trained, exact = (distiller(tiny_model, factors_of(tiny_model, "pivot")) for _ in range(2))
    # Both in float64: the gradient is a small difference of probabilities, and float32 models round it differently on
    # every processor.
    for each in (trained, exact):
        each.dense.double()
        each.student.double()
    trained.learn(0, row)
    p, q = (model(input_ids=row.view(2, 16)).logits.log_softmax(-1) for model in (exact.dense, exact.student))
    (p.exp() * (p - q)).sum(-1).mean().backward()
    for (found, _), (expected, _) in zip(trained.parameters, exact.parameters, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert (found.grad - expected.grad).abs().max() < 1e-4 * expected.grad.abs().max()


@pytest.mark.parametrize(
    ("form", "stored"), [("factors", torch.float32), ("pivot", torch.float32), ("pivot", torch.bfloat16)]
)
def test_distillation_lowers_the_divergence(
    tiny_model: Path, form: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Of the tensors as they are stored, also where the model computes in a wider dtype."""
    count_time_by_steps(monkeypatch, seconds=0.02)
    tensors, text = factors_of(tiny_model, form), windows(40, 32)
    for row in tensors.values():
        row.update({suffix: t.to(stored) for suffix, t in row.items() if t.is_floating_point()})
    held_out = windows(4, 32, seed=9)
    before = divergence_of(tiny_model, tensors, held_out)
    lines: list[str] = []
    refined = distiller(tiny_model, tensors).run(text, held_out, Dose(minutes=0.4), say=lines.append)
    assert refined.before == pytest.approx(before, rel=1e-4)
    # The returned factors are the evaluated ones.
    assert refined.after == pytest.approx(divergence_of(tiny_model, refined.tensors, held_out), rel=1e-4)
    assert refined.after < 0.9 * before
    assert refined.steps > 10
    assert lines == [
        f"distilled: {refined.steps} steps, held-out KL to the dense model "
        f"{refined.before:.4f} -> {refined.after:.4f} nats per token"
    ]
    for name, row in tensors.items():
        for suffix, tensor in row.items():
            new = refined.tensors[name][suffix]
            assert (new.shape, new.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(new, tensor) == (suffix == "pivots"), f"{name}.{suffix}"


def test_an_amount_of_tokens_does_not_depend_on_the_clock(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    tensors, text, held_out = factors_of(tiny_model, "pivot"), windows(6, 32), windows(2, 32, seed=9)
    results = []
    for seconds in (0.01, 1000.0):
        with monkeypatch.context() as patched:
            count_time_by_steps(patched, seconds)
            results.append(distiller(tiny_model, tensors).run(text, held_out, Dose(tokens=100 * 32 - 5)))
    assert [refined.steps for refined in results] == [100, 100]
    assert results[0].after == results[1].after < results[0].before
    for name, row in results[0].tensors.items():
        assert all(torch.equal(results[1].tensors[name][suffix], tensor) for suffix, tensor in row.items())


def test_windows_come_in_order_and_are_then_shuffled(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    keys: list[int] = []
    count_time_by_steps(monkeypatch, seconds=0.2)
    learn = Distiller.learn

    def recorded(self: Distiller, key: int, row: torch.Tensor) -> None:
        assert torch.equal(row, text[key])
        keys.append(key)
        learn(self, key, row)

    monkeypatch.setattr(Distiller, "learn", recorded)
    text = windows(7, 32)
    distiller(tiny_model, factors_of(tiny_model, "factors")).run(text, windows(2, 32, seed=9), Dose(minutes=0.1))
    assert len(keys) > 21
    assert keys[:7] == list(range(7))
    epochs = [keys[i : i + 7] for i in range(7, len(keys) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert any(epoch != list(range(7)) for epoch in epochs)


def test_short_windows_are_trained_on_together(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows of 32 tokens are a step of 100, each attending to itself alone; the seventh is a step by itself."""
    monkeypatch.setattr(refine, "STEP_TOKENS", 100)
    text, rows = windows(7, 32), []
    learn = Distiller.learn

    def recorded(self: Distiller, key: int, row: torch.Tensor) -> None:
        rows.append((key, row, self._piece))
        learn(self, key, row)

    monkeypatch.setattr(Distiller, "learn", recorded)
    dose = Dose(tokens=2 * text.numel())
    refined = distiller(tiny_model, factors_of(tiny_model, "factors")).run(text, windows(2, 32, 9), dose)
    assert refined.steps == 6
    assert [key for key, _, _ in rows[:3]] == [0, 1, 2]
    assert sorted(key for key, _, _ in rows[3:]) == [0, 1, 2]
    for key, row, piece in rows:
        assert piece == 32
        assert torch.equal(row.view(-1, 32), text[3 * key : 3 * key + 3])


def test_training_starts_with_unseen_text_without_held_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    passed: list[torch.Tensor] = []
    run = Distiller.run

    def recorded(self: Distiller, text: torch.Tensor, held_out: torch.Tensor, *rest: Any) -> Any:
        passed.extend((text, held_out))
        return run(self, text, held_out, *rest)

    monkeypatch.setattr(Distiller, "run", recorded)
    options = CompressOptions(str(tiny_model), tmp_path / "out", refine=0.02, dataset=("python-docs",), **OPTIONS)
    fitted = make_plan(options).data.windows.ids
    compress(options)
    text, held_out = (set(map(tuple, part.tolist())) for part in passed)
    assert len(held_out) == HELD_OUT
    assert not held_out & (text | set(map(tuple, fitted.tolist())))
    assert torch.equal(passed[0][-len(fitted) :], fitted)
    assert len(passed[0]) > len(fitted)


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_failed_distillation_returns_the_initial_factors(
    tiny_model: Path, rate: float, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(TrainedProjection, "rate", rate)
    count_time_by_steps(monkeypatch, seconds=0.06)
    # The factors are close to the dense model, so diverged weights cannot be closer by chance.
    tensors = factors_of(tiny_model, "factors", share=0.9)
    refined = distiller(tiny_model, tensors).run(windows(8, 32), windows(2, 32, seed=9), Dose(minutes=0.03))
    assert refined.steps > 0
    assert refined.before < 0.1
    assert refined.after == refined.before
    for name, row in tensors.items():
        assert all(torch.equal(refined.tensors[name][suffix], tensor) for suffix, tensor in row.items())


def test_equal_predictions_have_no_divergence(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Rounding gives a mean below 0 here."""
    count_time_by_steps(monkeypatch, seconds=0.2)
    monkeypatch.setattr(Distiller, "divergence", lambda _self, _key, _row: -1e-9)
    refined = distiller(tiny_model, factors_of(tiny_model, "factors")).run(
        windows(2, 32), windows(2, 32), Dose(minutes=0.01)
    )
    assert (refined.before, refined.after) == (0, 0)


def test_models_without_numbers_are_not_distilled(tiny_model: Path, one_thread: None) -> None:
    tensors = factors_of(tiny_model, "factors")
    for tensor in tensors["model.layers.1.mlp.down_proj"].values():
        tensor *= 1e30
    with pytest.raises(InputError, match=r"`refine`: the predictions of .* overflow in torch\.float32; omit it"):
        distiller(tiny_model, tensors).run(windows(2, 32), windows(2, 32, seed=9), Dose(minutes=0.01))


def test_a_gradient_that_overflows_is_skipped(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """One parameter's, and that at the last layer, of which all others consist."""
    learn, keys = Distiller.learn, []

    def recorded(self: Distiller, key: int, row: torch.Tensor) -> None:
        keys.append(key)
        learn(self, key, row)

    def overflowing(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([0]), float("inf")) if keys[-1] == 1 else gradient

    monkeypatch.setattr(Distiller, "learn", recorded)
    trained = distiller(tiny_model, factors_of(tiny_model, "factors"))
    trained.parameters[0][0].register_hook(overflowing)
    calls = 0

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += keys[-1] == 2
        return gradient * float("inf") if keys[-1] == 2 else gradient

    def hooked(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(infinite)

    trained.student.get_submodule("model.norm").register_forward_hook(hooked)
    refined = trained.run(windows(8, 32), windows(2, 32, seed=9), Dose(tokens=60 * 32))
    assert calls
    assert refined.steps == 60
    assert refined.after < refined.before


def test_models_that_share_parameters_are_trained_alike(tiny_model: Path, one_thread: None) -> None:
    tensors = factors_of(tiny_model, "pivot")
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    student = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    assert next(student.parameters()) is next(dense.parameters())
    given = windows(8, 32), windows(2, 32, seed=9), Dose(tokens=20 * 32)
    shared = Distiller(dense, student, "model.layers", tensors, {}).run(*given)
    apart = distiller(tiny_model, tensors).run(*given)
    assert (shared.before, shared.after) == (apart.before, apart.after)
    for name, row in shared.tensors.items():
        assert all(torch.equal(apart.tensors[name][suffix], tensor) for suffix, tensor in row.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in dense.named_parameters())


def test_factors_beyond_their_dtype_are_not_chosen(tiny_model: Path, one_thread: None) -> None:
    tensors = {
        name: {suffix: tensor.half() if suffix != "pivots" else tensor for suffix, tensor in row.items()}
        for name, row in factors_of(tiny_model, "factors").items()
    }
    trained = distiller(tiny_model, tensors)
    held_out = windows(1, 16)
    best = trained.evaluate(held_out) + 1
    with torch.no_grad():
        trained.trained["model.layers.0.mlp.up_proj"].down[0] *= 1e6
        trained.trained["model.layers.0.mlp.up_proj"].up[:, 0] *= 1e-6
    assert trained.evaluate(held_out) == math.inf
    assert trained._select(held_out, best, tensors) == (best, tensors)


def test_a_distilled_run_is_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    output, lines = tmp_path / "out", []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("distilled"):
            raise KeyboardInterrupt

    options = CompressOptions(str(tiny_model), output, refine=0.05, **OPTIONS)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        compress(options, say=stop)
    assert any(line.startswith("distilled") for line in lines)
    monkeypatch.setattr("pgsvd_vllm.offline.factors.problem.closed_form", None)  # the factors exist already
    resumed = CompressOptions(str(tiny_model), output, refine=0.05, resume=True, **OPTIONS)
    compress(resumed)
    assert (output / "config.json").is_file()


def test_a_run_that_stops_while_it_trains_ends_in_the_same_factors(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    compress(CompressOptions(str(tiny_model), tmp_path / "whole", **OPTIONS))
    learn = Distiller.learn
    calls = 0

    def interrupted(self: Distiller, key: int, row: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        learn(self, key, row)

    monkeypatch.setattr(Distiller, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        compress(CompressOptions(str(tiny_model), tmp_path / "out", **OPTIONS))
    compress(CompressOptions(str(tiny_model), tmp_path / "out", resume=True, **OPTIONS))
    whole, found = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_distillation_needs_held_out_windows(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("word " * (64 * HELD_OUT // 5), encoding="utf-8")
    options = CompressOptions(str(tiny_model), tmp_path / "out", refine=1, dataset=(str(text),), **OPTIONS)
    with pytest.raises(InputError, match=f"too little calibration text: {1 + HELD_OUT} x --max-seq-length 64"):
        make_plan(options)
    with pytest.raises(InputError, match="--refine -1: must be a number of minutes, or 0"):
        make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=-1))


def test_the_estimate_includes_distillation(tiny_model: Path, tmp_path: Path) -> None:
    plans = [
        make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=refine, **OPTIONS))
        for refine in (0, None, 5)
    ]
    plain, default, minutes = (stage_bytes(plan) for plan in plans)
    assert default.keys() == minutes.keys() == {*plain, "distillation"}
    assert estimate(plans[2]).seconds > estimate(plans[0]).seconds + 250
