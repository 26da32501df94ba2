"""MoE layers whose experts have ranks and forms of their own, against float64: from factors, and reconstructed."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.serving.layers import moe as moe_module
from pgsvd_vllm.serving.layers.moe import FactoredMoEMethod
from pgsvd_vllm.serving.layers.moe_dense import DenseFallbackMoEMethod
from pgsvd_vllm.serving.quant_config import PgsvdConfig
from pgsvd_vllm.serving.vllm_compat.internals import encode

PREFIX = "model.layers.0.mlp.experts"
EXPERTS, CHOSEN, HIDDEN, INNER = 5, 2, 64, 96
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
# Of each expert in turn; the fourth is dense.
FORMS = (
    {"gate_proj": ("factors", 16), "up_proj": ("factors", 24), "down_proj": ("factors", 32)},
    {"gate_proj": ("pivot", 16), "up_proj": ("pivot", 17), "down_proj": ("pivot", 8)},
    {"gate_proj": ("pivot", 40), "down_proj": ("factors", 5)},
    {},
    {"up_proj": ("factors", 48)},
)

pytestmark = pytest.mark.usefixtures("vllm_world")


class MoELayer:
    """vLLM's MoE layer, made and loaded, and its experts' matrices in float64."""

    def __init__(
        self, dtype: torch.dtype, table: dict[str, FactoredModule] | None = None, prefix: str = PREFIX
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = {
            f"{PREFIX}.{number}.{leaf}": FactoredModule(rank, form)
            for number, forms in enumerate(FORMS)
            for leaf, (form, rank) in forms.items()
        }
        self.tensors: dict[str, torch.Tensor] = {}
        self.weights: dict[tuple[int, str], torch.Tensor] = {}
        for number in range(EXPERTS):
            for leaf, (rows, columns) in SHAPES.items():
                module = self.table.get(f"{PREFIX}.{number}.{leaf}")
                shapes = {"weight": (rows, columns)} if module is None else module.shapes(rows, columns)
                parts = {}
                for suffix, shape in shapes.items():
                    parts[suffix] = torch.randn(shape, generator=generator).mul(1 / math.sqrt(shape[-1])).to(dtype)
                    if suffix == "pivots":
                        parts[suffix] = torch.randperm(rows, generator=generator)[: shape[0]].sort().values.int()
                    self.tensors[f"{number}.{leaf}.{suffix}"] = parts[suffix]
                self.weights[number, leaf] = exact(parts)
        self.config = VllmConfig()
        with set_current_vllm_config(self.config):
            self.runner: Any = FusedMoEFactory(
                num_experts=EXPERTS,
                top_k=CHOSEN,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                params_dtype=dtype,
                quant_config=PgsvdConfig(self.table if table is None else table),
                prefix=prefix,
            )
        self.layer = self.runner.routed_experts
        self.method = self.layer.quant_method

    def load(self, without: str = "") -> set[str]:
        given = [(name, tensor) for name, tensor in self.tensors.items() if name != without]
        with set_current_vllm_config(self.config):
            found = set(self.runner.load_weights(given))
            self.method.process_weights_after_loading(self.layer)
        return found

    def expected(self, x: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x, dtype=torch.float64)
        for token in range(len(x)):
            for weight, number in zip(weights[token].double(), numbers[token].tolist(), strict=True):
                gate, up = (x[token].double() @ self.weights[number, leaf].T for leaf in ("gate_proj", "up_proj"))
                result[token] += weight * ((F.silu(gate) * up) @ self.weights[number, "down_proj"].T)
        return result


def exact(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix that a form's tensors stand for, float64."""
    if "weight" in parts:
        return parts["weight"].double()
    if "weight_u" in parts:
        return parts["weight_u"].double() @ parts["weight_v"].double()
    p, c, pivots = parts["weight_p"].double(), parts["weight_c"].double(), parts["pivots"].long()
    rows = torch.empty(len(p) + len(c), len(p), dtype=torch.float64)
    others = torch.ones(len(rows), dtype=torch.bool)
    others[pivots] = False
    rows[pivots], rows[others] = torch.eye(len(p), dtype=torch.float64), c
    return rows @ p


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the experts of each token; nobody chooses the last one."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(tokens)])
    return torch.rand(tokens, CHOSEN, generator=generator), numbers.int()


@pytest.mark.parametrize("kind", [FactoredMoEMethod, DenseFallbackMoEMethod])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_moe_layer_matches_float64(
    kind: type, dtype: torch.dtype, bound: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is DenseFallbackMoEMethod:
        monkeypatch.setattr(moe_module, "ACTIVATIONS", {})
    moe = MoELayer(dtype)
    assert type(moe.method) is kind
    moe.load()
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights, numbers = routed(tokens)
    with set_current_vllm_config(moe.config):
        y = moe.method.apply(moe.layer, x, weights, numbers, None, None)
    expected = moe.expected(x, weights, numbers)
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < bound


def test_all_modules_are_claimed_and_parameters_named() -> None:
    moe = MoELayer(torch.float32)
    moe.layer.quant_config.check_claimed()
    assert {name.removeprefix("routed_experts.") for name in moe.load()} == set(dict(moe.layer.named_parameters()))


def test_moe_layer_without_factors_is_vllms_own() -> None:
    assert type(MoELayer(torch.float32, table={}).method).__name__ == "UnquantizedFusedMoEMethod"


@pytest.mark.parametrize("kind", [FactoredMoEMethod, DenseFallbackMoEMethod])
@pytest.mark.parametrize("missing", ["1.gate_proj.weight_c", "0.down_proj.weight_u", "2.gate_proj.pivots"])
def test_missing_factor_is_named(kind: type, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is DenseFallbackMoEMethod:
        monkeypatch.setattr(moe_module, "ACTIVATIONS", {})
    with pytest.raises(CheckpointError, match=rf"experts\.{missing.rpartition('.')[0]}"):
        MoELayer(torch.float32).load(without=missing)


@pytest.mark.parametrize("kind", [FactoredMoEMethod, DenseFallbackMoEMethod])
def test_unlisted_factor_is_refused(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is DenseFallbackMoEMethod:
        monkeypatch.setattr(moe_module, "ACTIVATIONS", {})
    moe = MoELayer(torch.float32)
    moe.tensors["2.down_proj.weight_c"] = torch.zeros(8, 8)
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj"):
        moe.load()


def test_op_passes_torchs_opcheck() -> None:
    moe = MoELayer(torch.float32)
    moe.load()
    x = torch.randn(6, HIDDEN)
    torch.library.opcheck(torch.ops.pgsvd.experts, (x, *routed(6), encode(moe.method.prefix)))


def test_draft_and_target_experts_stay_apart() -> None:
    target, draft = MoELayer(torch.float32), MoELayer(torch.float32, prefix=f"draft_model.{PREFIX}")
    draft.tensors = {name: 2 * t if t.is_floating_point() else t for name, t in draft.tensors.items()}
    for moe in (target, draft):
        moe.load()
    x, (weights, numbers) = torch.randn(3, HIDDEN), routed(3)
    found = [m.method.apply(m.layer, x, weights, numbers, None, None) for m in (target, draft)]
    torch.testing.assert_close(found[0].double(), target.expected(x, weights, numbers), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


@pytest.mark.parametrize("kind", [FactoredMoEMethod, DenseFallbackMoEMethod])
def test_second_load_is_refused(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is DenseFallbackMoEMethod:
        monkeypatch.setattr(moe_module, "ACTIVATIONS", {})
    moe = MoELayer(torch.float32)
    moe.load()
    with pytest.raises(CheckpointError, match="loaded once; restart the server"):
        moe.load()
