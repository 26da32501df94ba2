"""Whose activation a factored layer takes over: of MLPs of vLLM whose source is the one that was read."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.platforms import current_platform

from pgsvd_vllm.serving.layers.fused_silu import fuse_silu, is_known, source_hash
from tests.serving.layers.test_linear import HIDDEN, WIDE, Case

pytestmark = pytest.mark.usefixtures("vllm_world")


def with_factors(mlp: nn.Module, name: str) -> nn.Module:
    """An MLP of vLLM whose gate and up layer is factored."""
    mlp.gate_up_proj = Case("gate_up_proj", (33, 20), dtype=torch.bfloat16, prefix=name).layer
    return mlp


class Other(LlamaMLP):
    """Of a known class by its name, as if a version of vLLM had changed the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(gate_up))[0] + gate_up.sum()


Other.__module__, Other.__qualname__ = LlamaMLP.__module__, LlamaMLP.__qualname__


def test_only_a_known_source_gives_its_activation_away(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [with_factors(kind(HIDDEN, WIDE, "silu", prefix=kind.__name__), kind.__name__) for kind in MLPS]
    other = with_factors(Other(HIDDEN, WIDE, "silu", prefix="other"), "other")
    activation, config = other.act_fn, VllmConfig()
    # Triton's kernels are not run: only the question whether there is a GPU is answered otherwise than the truth.
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda _: True)
    assert fuse_silu(nn.ModuleList([other]), config) == 0
    assert other.act_fn is activation
    assert other.gate_up_proj.quant_method.activation is None
    assert config.additional_config == {}
    assert fuse_silu(nn.ModuleList(known), config) == len(MLPS)
    assert all(isinstance(mlp.act_fn, nn.Identity) for mlp in known)
    assert config.additional_config["pgsvd"]["fused_activations"] == len(MLPS)


MLPS = (LlamaMLP, Qwen2MLP)


def test_a_forward_without_source_is_unknown() -> None:
    namespace: dict[str, type] = {"LlamaMLP": LlamaMLP}
    exec("class Made(LlamaMLP):\n    def forward(self, x):\n        return x\n", namespace)
    made = namespace["Made"]
    made.__module__, made.__qualname__ = LlamaMLP.__module__, LlamaMLP.__qualname__
    assert is_known(LlamaMLP)
    assert not is_known(made)


def test_layout_and_docstring_do_not_change_the_hash() -> None:
    plain = "def forward(self, x):\n    return self.act_fn(x)\n"
    assert source_hash(plain) == source_hash(
        '    def forward(self, x):\n        """Says more."""\n        # and more\n        return self.act_fn( x )\n'
    )
    assert source_hash(plain) != source_hash(plain.replace("act_fn", "other"))
