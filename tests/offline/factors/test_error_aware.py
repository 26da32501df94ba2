"""Error-aware targets against their definition, with activations of two whole models in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.factors.error_aware import CORRECTED, RIDGE, STREAM_CORRECTED, Target
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model
from tests.offline.calibration.test_gram import clipped, reference_inputs, windows
from tests.offline.whole import each, error_aware

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RANK = 20


def groups_of(row: list[Projection]) -> list[list[Projection]]:
    by_leaf = {p.name.rpartition(".")[2]: p for p in row}
    return [[by_leaf[leaf] for leaf in group] for group in GROUPS]


def truncated(weight: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def stream_before(folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """The residual stream before the addition of every o_proj and down_proj, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}"

        def enter(_m: object, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            found[f"{name}.self_attn.o_proj"] = args[0].numpy().copy()

        layer.register_forward_pre_hook(enter)

        def middle(_m: object, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            found[f"{name}.mlp.down_proj"] = args[0].numpy().copy()

        layer.post_attention_layernorm.register_forward_pre_hook(middle)
    with torch.no_grad():
        model(input_ids=ids)
    return found


def test_targets_match_the_definition(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2, bias=True, seed=5)
    ids = windows(12, 40)
    source = ModelSource(folder)
    fit_pass = error_aware(source, text_batches(ids))[0]
    seen: dict[str, Target] = {}
    weights: dict[str, torch.Tensor] = {}

    def fit(p: Projection, target: Target) -> torch.Tensor:
        seen[p.name] = target
        weights[p.name] = truncated(source.weights.read(f"{p.name}.weight"))
        return weights[p.name]

    for index, row in enumerate(find_projections(source).layers):
        names = [p.name for group in groups_of(row) for p in group]
        dense_one = names.pop(1)  # a projection that stays dense
        found = [p.name for p in fit_pass.advance(index, groups_of(row), set(names), each(fit), {})]
        assert found == names
        assert dense_one not in seen

    # The inputs of a projection depend only on earlier factors, so the factored model has the same inputs.
    factored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, value in weights.items():
        factored.get_submodule(name).weight.data.copy_(value)
    factored.save_pretrained(tmp_path / "factored")
    inputs = [reference_inputs(path, ids) for path in (folder, tmp_path / "factored")]
    streams = [stream_before(path, ids) for path in (folder, tmp_path / "factored")]
    largest_change, shifted = 0.0, 0
    for name, target in seen.items():
        x, y = inputs[0][name], inputs[1][name]
        rows = clipped(y)
        scale = np.linalg.norm(rows, axis=1) / np.linalg.norm(y.reshape(rows.shape), axis=1)
        dense_rows = x.reshape(rows.shape) * scale[:, None]
        np.testing.assert_allclose(target.gram.numpy(), rows.T @ rows, atol=2e-5 * np.abs(rows.T @ rows).max())
        plain = clipped(x)
        assert target.dense is not None
        np.testing.assert_allclose(target.dense.numpy(), plain.T @ plain, atol=2e-5 * np.abs(plain.T @ plain).max())
        # The minimum as a least-squares problem: rows of mixed targets and a ridge towards W.
        lam = RIDGE * float(np.mean(np.diag(rows.T @ rows)))
        weight = source.weights.read(f"{name}.weight").double().numpy()
        outputs = ((1 - CORRECTED) * rows + CORRECTED * dense_rows) @ weight.T
        if name in streams[0]:
            error = streams[0][name] - streams[1][name]
            outputs += STREAM_CORRECTED * error.reshape(outputs.shape) * scale[:, None]
            assert target.shift is not None
            shifted += bool(target.shift.abs().max() > 1e-3)
        else:
            assert target.shift is None
        a = np.vstack([rows, lam**0.5 * np.eye(rows.shape[1])])
        b = np.vstack([outputs, lam**0.5 * weight.T])
        best = np.linalg.lstsq(a, b, rcond=None)[0].T
        found_target = target.of(torch.from_numpy(weight)).numpy()
        assert np.linalg.norm(found_target - best) < 2e-3 * np.linalg.norm(best), name
        largest_change = max(largest_change, float(np.linalg.norm(best - weight) / np.linalg.norm(weight)))
    assert largest_change > 0.05, "the targets equal the weights: nothing was tested"
    assert shifted >= 3, "the residual stream was never corrected"


def test_scaled_outputs_get_no_stream_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    layer: Any = source.layers[0]
    plain = layer.mlp.forward
    # As in models with a norm after the projection.
    monkeypatch.setattr(layer.mlp, "forward", lambda x: plain(x) * 0.5)
    fit_pass = error_aware(source, text_batches(windows(8, 40)))[0]
    targets: list[Target] = []

    def fit(p: Projection, target: Target) -> torch.Tensor:
        targets.append(target)
        return truncated(source.weights.read(f"{p.name}.weight"))

    row = find_projections(source).layers[0]
    list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(fit), {}))
    assert len(targets) == 7
    assert all(target.shift is None for target in targets)


@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_a_projection_of_no_output_corrects_nothing(tmp_path: Path, factor: float) -> None:
    """Else its weights would grow until its tiny inputs explain the residual stream's error."""
    folder = save_tiny_model(tmp_path / "model", layers=1)
    tensors = load_file(folder / "model.safetensors")
    changed = "up_proj" if factor else "down_proj"
    tensors[f"model.layers.0.mlp.{changed}.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(folder)
    fit_pass = error_aware(source, text_batches(windows(12, 40)))[0]
    targets: dict[str, tuple[Target, torch.Tensor]] = {}

    def fit(p: Projection, target: Target) -> torch.Tensor:
        weight = source.weights.read(f"{p.name}.weight").double()
        targets[p.path.rpartition(".")[2]] = target, weight
        return truncated(weight)

    row = find_projections(source).layers[0]
    list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(fit), {}))
    target, weight = targets["down_proj"]
    assert target.shift is None
    assert target.of(weight).norm() <= 10 * weight.norm()
    assert targets["o_proj"][0].shift is not None


def test_inputs_of_zero_give_no_target(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(folder)
    fit_pass = error_aware(source, text_batches(windows(12, 40)))[0]
    seen: dict[str, Target | None] = {}

    def fit(p: Projection, target: Target | None) -> torch.Tensor:
        seen[p.path.rpartition(".")[2]] = target
        return truncated(source.weights.read(f"{p.name}.weight"))

    row = find_projections(source).layers[0]
    list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(fit), {}))
    assert [name for name, target in seen.items() if target is None] == ["down_proj"]


def test_no_dense_gram_if_all_calibration_tokens_take_part(tmp_path: Path) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    row = find_projections(source).layers[0]
    seen: list[list[Target]] = [[], []]
    for all_tokens in (False, True):
        fit_pass = error_aware(source, text_batches(windows(8, 40)), all_tokens)[0]

        def fit(p: Projection, target: Target, all_tokens: bool = all_tokens) -> torch.Tensor:
            seen[all_tokens].append(target)
            return truncated(source.weights.read(f"{p.name}.weight"))

        list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(fit), {}))
    for plain, all_text in zip(*seen, strict=True):
        assert plain.dense is not None
        assert all_text.dense is None
        assert torch.equal(plain.gram, all_text.gram)
        assert torch.equal(plain.change, all_text.change)


def test_fewer_tokens_than_inputs_give_no_target(tmp_path: Path) -> None:
    """The fit would overfit these tokens."""
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    row = find_projections(source).layers[0]
    tokens = 4 * 40
    assert {p.in_features < tokens for p in row} == {False, True}
    seen: dict[str, Target | None] = {}

    def fit(p: Projection, target: Target | None) -> torch.Tensor:
        seen[p.name] = target
        return truncated(source.weights.read(f"{p.name}.weight"))

    fit_pass = error_aware(source, text_batches(windows(4, 40)))[0]
    list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(fit), {}))
    assert {p.name for p in row if p.in_features > tokens} == {name for name, one in seen.items() if one is None}


@pytest.mark.parametrize("skipped", ["mlp", "down_proj"])
def test_a_projection_that_is_not_called_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str
) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    mlp: Any = source.layers[0].get_submodule("mlp")
    plain, calls = mlp.forward, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 1:  # of the dense layer
            return plain(x)
        return x if skipped == "mlp" else mlp.gate_proj(x)[..., : x.shape[-1]]

    row = find_projections(source).layers[0]
    fit_pass = error_aware(source, text_batches(windows(8, 40)))[0]
    monkeypatch.setattr(mlp, "forward", forward)
    name = "down_proj" if skipped == "down_proj" else "gate_proj"
    with pytest.raises(InputError, match=rf"mlp\.{name}: its tokens depend on the weights before it \(a router\)"):
        list(
            fit_pass.advance(
                0,
                groups_of(row),
                {p.name for p in row},
                each(lambda p, _t: truncated(source.weights.read(f"{p.name}.weight"))),
                {},
            )
        )
    assert len(calls) == 2


def test_a_known_layer_runs_without_a_fit(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2, seed=5)
    ids = windows(4, 40)
    source = ModelSource(folder)
    row = find_projections(source).layers[0]
    weights = {p.name: truncated(source.weights.read(f"{p.name}.weight")) for p in row}

    def never(p: Projection, target: Target) -> torch.Tensor:
        pytest.fail(f"{p.name} was fitted again")

    passes, shards = zip(*(error_aware(source, text_batches(ids)) for _ in range(2)), strict=True)
    list(passes[0].advance(0, groups_of(row), set(weights), each(lambda p, _target: weights[p.name]), {}))
    list(passes[1].advance(0, groups_of(row), set(weights), each(never), weights))
    for first, second in zip(shards[0].factored.hidden, shards[1].factored.hidden, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(shards[1].factored.hidden[0], shards[1].dense.hidden[0])


def test_overflow_is_named(tmp_path: Path) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=2))
    fit_pass = error_aware(source, text_batches(windows(2, 20)))[0]
    row = find_projections(source).layers[0]

    def huge(p: Projection, _target: Target) -> torch.Tensor:
        return torch.full((p.out_features, p.in_features), 1e38, dtype=torch.float64)

    with pytest.raises(InputError, match=r"model\.layers\.0\S*: the factored model overflows here in torch\.float32"):
        list(fit_pass.advance(0, groups_of(row), {p.name for p in row}, each(huge), {}))
