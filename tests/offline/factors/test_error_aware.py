"""Error-aware targets against their definition, from the inputs of two whole models in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.factors.error_aware import CORRECTED, RIDGE, STREAM_CORRECTED, ErrorAwarePass, Target
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model
from tests.offline.calibration.test_gram import CPU, clipped, reference_inputs, windows

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RANK = 20


def groups_of(row: list[Projection]) -> list[list[Projection]]:
    by_leaf = {p.name.rpartition(".")[2]: p for p in row}
    return [[by_leaf[leaf] for leaf in group] for group in GROUPS]


def truncated(weight: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def stream_before(folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """The residual stream in front of every o_proj's and down_proj's addition, in float64."""
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


def test_targets_are_those_of_the_definition(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2, bias=True, seed=5)
    ids = windows(12, 40)
    source = ModelSource(folder)
    walk = ErrorAwarePass(LayerStream(source, text_batches(ids), CPU, torch.float32))
    seen: dict[str, Target] = {}
    products: dict[str, torch.Tensor] = {}

    def fit(p: Projection, target: Target) -> torch.Tensor:
        seen[p.name] = target
        products[p.name] = truncated(source.weights.read(f"{p.name}.weight"))
        return products[p.name]

    for index, row in enumerate(find_projections(source).layers):
        names = [p.name for group in groups_of(row) for p in group]
        dense_one = names.pop(1)  # a projection that stays dense
        found = [p.name for p in walk.advance(index, groups_of(row), set(names), fit, {})]
        assert found == names
        assert dense_one not in seen

    # The inputs of a projection depend on the factors before it alone, so the finished model shows them.
    factored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, value in products.items():
        factored.get_submodule(name).weight.data.copy_(value)
    factored.save_pretrained(tmp_path / "factored")
    inputs = [reference_inputs(path, ids) for path in (folder, tmp_path / "factored")]
    streams = [stream_before(path, ids) for path in (folder, tmp_path / "factored")]
    moved, shifted = 0.0, 0
    for name, target in seen.items():
        x, y = inputs[0][name], inputs[1][name]
        rows = clipped(y)
        scale = np.linalg.norm(rows, axis=1) / np.linalg.norm(y.reshape(rows.shape), axis=1)
        wanted = x.reshape(rows.shape) * scale[:, None]
        np.testing.assert_allclose(target.gram.numpy(), rows.T @ rows, atol=2e-5 * np.abs(rows.T @ rows).max())
        plain = clipped(x)
        assert target.dense is not None
        np.testing.assert_allclose(target.dense.numpy(), plain.T @ plain, atol=2e-5 * np.abs(plain.T @ plain).max())
        # The argmin as a least-squares problem: rows of mixed targets, and a ridge towards W itself.
        lam = RIDGE * float(np.mean(np.diag(rows.T @ rows)))
        weight = source.weights.read(f"{name}.weight").double().numpy()
        outputs = ((1 - CORRECTED) * rows + CORRECTED * wanted) @ weight.T
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
        moved = max(moved, float(np.linalg.norm(best - weight) / np.linalg.norm(weight)))
    assert moved > 0.05, "the targets are the weights themselves: nothing was tested"
    assert shifted >= 3, "the residual stream was never corrected"


def test_a_projection_whose_output_is_not_added_as_it_is_gets_no_share_of_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    layer: Any = source.layers[0]
    plain = layer.mlp.forward
    # As models with a norm behind the projection do.
    monkeypatch.setattr(layer.mlp, "forward", lambda x: plain(x) * 0.5)
    walk = ErrorAwarePass(LayerStream(source, text_batches(windows(8, 40)), CPU, torch.float32))
    targets: list[Target] = []

    def fit(p: Projection, target: Target) -> torch.Tensor:
        targets.append(target)
        return truncated(source.weights.read(f"{p.name}.weight"))

    row = find_projections(source).layers[0]
    list(walk.advance(0, groups_of(row), {p.name for p in row}, fit, {}))
    assert len(targets) == 7
    assert all(target.shift is None for target in targets)


def test_the_dense_gram_matrix_is_not_summed_where_all_text_takes_part(tmp_path: Path) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    row = find_projections(source).layers[0]
    seen: list[list[Target]] = [[], []]
    for whole in (False, True):
        walk = ErrorAwarePass(LayerStream(source, text_batches(windows(8, 40)), CPU, torch.float32), whole)

        def fit(p: Projection, target: Target, whole: bool = whole) -> torch.Tensor:
            seen[whole].append(target)
            return truncated(source.weights.read(f"{p.name}.weight"))

        list(walk.advance(0, groups_of(row), {p.name for p in row}, fit, {}))
    for plain, all_text in zip(*seen, strict=True):
        assert plain.dense is not None
        assert all_text.dense is None
        assert torch.equal(plain.gram, all_text.gram)
        assert torch.equal(plain.change, all_text.change)


def test_fewer_tokens_than_inputs_give_no_target(tmp_path: Path) -> None:
    """They would be learnt by heart."""
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    row = find_projections(source).layers[0]
    tokens = 4 * 40
    assert {p.in_features < tokens for p in row} == {False, True}
    seen: dict[str, Target | None] = {}

    def fit(p: Projection, target: Target | None) -> torch.Tensor:
        seen[p.name] = target
        return truncated(source.weights.read(f"{p.name}.weight"))

    walk = ErrorAwarePass(LayerStream(source, text_batches(windows(4, 40)), CPU, torch.float32))
    list(walk.advance(0, groups_of(row), {p.name for p in row}, fit, {}))
    assert {p.name for p in row if p.in_features > tokens} == {name for name, one in seen.items() if one is None}


@pytest.mark.parametrize("skipped", ["mlp", "down_proj"])
def test_a_projection_that_the_factored_layer_does_not_call_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str
) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=1))
    mlp: Any = source.layers[0].get_submodule("mlp")
    plain, calls = mlp.forward, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 1:  # the dense layer's
            return plain(x)
        return x if skipped == "mlp" else mlp.gate_proj(x)[..., : x.shape[-1]]

    monkeypatch.setattr(mlp, "forward", forward)
    walk = ErrorAwarePass(LayerStream(source, text_batches(windows(8, 40)), CPU, torch.float32))
    row = find_projections(source).layers[0]
    name = "down_proj" if skipped == "down_proj" else "gate_proj"
    with pytest.raises(InputError, match=rf"mlp\.{name}: its tokens depend on the weights before it \(a router\)"):
        list(
            walk.advance(
                0,
                groups_of(row),
                {p.name for p in row},
                lambda p, _t: truncated(source.weights.read(f"{p.name}.weight")),
                {},
            )
        )
    assert len(calls) == 2


def test_a_layer_that_is_known_is_run_and_not_fitted(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2, seed=5)
    ids = windows(4, 40)
    source = ModelSource(folder)
    row = find_projections(source).layers[0]
    products = {p.name: truncated(source.weights.read(f"{p.name}.weight")) for p in row}

    def never(p: Projection, target: Target) -> torch.Tensor:
        pytest.fail(f"{p.name} was fitted again")

    walks = [ErrorAwarePass(LayerStream(source, text_batches(ids), CPU, torch.float32)) for _ in range(2)]
    list(walks[0].advance(0, groups_of(row), set(products), lambda p, _target: products[p.name], {}))
    list(walks[1].advance(0, groups_of(row), set(products), never, products))
    for first, second in zip(walks[0].factored.hidden, walks[1].factored.hidden, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(walks[1].factored.hidden[0], walks[1].dense.hidden[0])


def test_overflow_is_named(tmp_path: Path) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model", layers=2))
    walk = ErrorAwarePass(LayerStream(source, text_batches(windows(2, 20)), CPU, torch.float32))
    row = find_projections(source).layers[0]

    def huge(p: Projection, _target: Target) -> torch.Tensor:
        return torch.full((p.out_features, p.in_features), 1e38, dtype=torch.float64)

    with pytest.raises(InputError, match=r"model\.layers\.0\S*: the factored model overflows here in torch\.float32"):
        list(walk.advance(0, groups_of(row), {p.name for p in row}, huge, {}))
