"""Engines of one process have layers of the same names, each with its own weights."""

import gc

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from pgsvd_vllm.serving.layers.dense import DenseBesideFactored, share_graphs
from pgsvd_vllm.serving.vllm_compat.internals import encode, find_layer
from tests.serving.layers.test_linear import HIDDEN, Case, check
from tests.serving.layers.test_moe import MoELayer, routed

pytestmark = pytest.mark.usefixtures("vllm_world")


def compiled_config() -> VllmConfig:
    """Of an engine whose factored layers are ops while they are compiled."""
    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    return config


def engine_layer(seed: int, prefix: str, ranks: tuple[int | None, ...] = (24, None, 16)) -> tuple[VllmConfig, Case]:
    """A loaded layer in an engine of its own."""
    config = compiled_config()
    with set_current_vllm_config(config):
        return config, Case("qkv_proj", ranks, seed=seed, prefix=prefix).load().finish()


def test_each_engine_computes_with_its_own_factors() -> None:
    engines = [engine_layer(seed, "vision.0") for seed in (1, 2)]
    for config, case in engines:
        assert case.layer.quant_method.opaque
        check(case, torch.randn(5, HIDDEN))
        with set_current_vllm_config(config), set_forward_context(None, config):
            check(case, torch.randn(5, HIDDEN))


def test_each_engine_computes_with_its_own_dense_layer() -> None:
    engines = []
    for seed in (1, 2):
        config = compiled_config()
        with set_current_vllm_config(config):
            beside = Case("qkv_proj", (24, None, 16), prefix="vision.1")
            case = Case("qkv_proj", (None, None, None), seed=seed, prefix="vision.2")
            assert share_graphs(torch.nn.ModuleList([beside.layer, case.layer]), config) == 1
        assert isinstance(case.layer.quant_method, DenseBesideFactored)
        engines.append(case.load().finish())
    for case in engines:
        check(case, torch.randn(5, HIDDEN))


def test_each_engine_computes_with_its_own_experts() -> None:
    layers = [MoELayer(torch.float32) for _ in range(2)]
    layers[1].tensors = {n: 2 * t if t.is_floating_point() else t for n, t in layers[1].tensors.items()}
    for moe in layers:
        moe.load()
    x, (weights, numbers) = torch.randn(3, HIDDEN), routed(3)
    found = [m.method.apply(m.layer, x, weights, numbers, None, None) for m in layers]
    torch.testing.assert_close(found[0].double(), layers[0].expected(x, weights, numbers), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_compiled_code_finds_the_layer_of_its_engine() -> None:
    engines = [engine_layer(seed, "vision.3") for seed in (1, 2)]
    x, name = torch.randn(5, HIDDEN), encode("vision.3.qkv_proj")
    for config, case in engines:
        with set_forward_context(None, config):
            y = torch.ops.pgsvd.linear(x, None, 128, name)
        expected, bound = case.expected(x)
        assert ((y.double() - expected).abs() <= bound).all()


def test_an_ambiguous_name_without_context_is_refused() -> None:
    engines = [engine_layer(seed, "vision.4") for seed in (1, 2)]
    x, name = torch.randn(5, HIDDEN), encode("vision.4.qkv_proj")
    with pytest.raises(RuntimeError, match=r"^2 engines in this process have a layer vision\.4\.qkv_proj, "):
        torch.ops.pgsvd.linear(x, None, 128, name)
    # An engine that is gone leaves its layer to the other one.
    gc.disable()
    try:
        del engines[0]
        y = torch.ops.pgsvd.linear(x, None, 128, name)
    finally:
        gc.enable()
    assert find_layer(name) is engines[0][1].layer
    expected, bound = engines[0][1].expected(x)
    assert ((y.double() - expected).abs() <= bound).all()
