"""Weights reconstructed for layers that are dense in vLLM's model, against float64."""

import random

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.models.utils import StageMissingLayer

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.serving.dense_fallback import patterns, reconstructed_weights
from pgsvd_vllm.serving.quant_config import PgsvdConfig

OUT, WIDTH, RANK = 12, 10, 4


def checkpoint() -> tuple[dict[str, FactoredModule], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Forms, tensors, and the reconstructed weights in float64."""
    torch.manual_seed(0)
    u, v, p, c = (torch.randn(*shape) for shape in ((OUT, RANK), (RANK, WIDTH), (RANK, WIDTH), (OUT - RANK, RANK)))
    pivots = torch.tensor([0, 3, 7, 11], dtype=torch.int32)
    tensors = {"a.x.weight_u": u, "a.x.weight_v": v, "a.x.bias": torch.randn(OUT), "b.weight": torch.randn(3, 3)}
    tensors |= {"a.y.weight_p": p, "a.y.weight_c": c, "a.y.pivots": pivots}
    whole = torch.empty(OUT, WIDTH, dtype=torch.float64)
    whole[pivots.long()] = p.double()
    whole[[i for i in range(OUT) if i not in pivots.tolist()]] = c.double() @ p.double()
    forms = {"a.x": FactoredModule(RANK), "a.y": FactoredModule(RANK, "pivot")}
    return forms, tensors, {"a.x": u.double() @ v.double(), "a.y": whole}


@pytest.mark.parametrize("seed", range(4))
def test_factors_become_weights_whatever_their_order(seed: int) -> None:
    forms, tensors, expected = checkpoint()
    given = list(tensors.items())
    random.Random(seed).shuffle(given)
    found = dict(reconstructed_weights(given, forms))
    assert found.keys() == {"a.x.weight", "a.x.bias", "a.y.weight", "b.weight"}
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"].double(), weight, atol=1e-5, rtol=1e-5)
        assert found[f"{name}.weight"].dtype == torch.float32
    assert found["b.weight"] is tensors["b.weight"]


def test_factors_of_other_modules_stay() -> None:
    forms, tensors, _ = checkpoint()
    found = dict(reconstructed_weights(tensors.items(), {"a.y": forms["a.y"]}))
    assert found.keys() == {"a.x.weight_u", "a.x.weight_v", "a.x.bias", "a.y.weight", "b.weight"}


def test_one_pattern_stands_for_all_layers() -> None:
    names = ("m.v.0.q", "m.v.11.q", "m.v.0.fc1", "head.2")
    assert patterns({name: FactoredModule(RANK) for name in names}) == ["'m.v.*.q'", "'m.v.*.fc1'", "'head.2'"]


def test_impossible_pivots_are_named() -> None:
    forms, tensors, _ = checkpoint()
    tensors["a.y.pivots"] = torch.tensor([0, 3, 7, OUT], dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"a\.y\.pivots"):
        list(reconstructed_weights(tensors.items(), forms))


def test_missing_factor_is_refused() -> None:
    forms, tensors, _ = checkpoint()
    del tensors["a.y.weight_c"]
    with pytest.raises(CheckpointError, match=r"^a\.y: not all"):
        list(reconstructed_weights(tensors.items(), forms))


def test_disabled_towers_are_claimed_not_reconstructed() -> None:
    forms, _, _ = checkpoint()
    config = PgsvdConfig(forms)
    tower = nn.Module()
    tower.x, tower.y = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
    model = nn.Module()
    model.a = StageMissingLayer("image", tower)
    assert config.dense_fallbacks(model) == {}
    config.check_claimed()


def test_dense_layers_are_found_by_either_name() -> None:
    forms, _, _ = checkpoint()
    config = PgsvdConfig(forms)
    config.modules["vllm.x"] = config.modules["a.x"]  # as a mapper has named it
    model = nn.Module()
    model.vllm = nn.Module()
    model.vllm.x = nn.Linear(WIDTH, OUT)
    found = config.dense_fallbacks(model)
    assert found == {"a.x": forms["a.x"], "vllm.x": forms["a.x"]}
    assert patterns(found) == ["'a.x'"]
    with pytest.raises(CheckpointError, match=r"^a\.y: "):
        config.check_claimed()
    assert config.dense_fallbacks(model) == {}
