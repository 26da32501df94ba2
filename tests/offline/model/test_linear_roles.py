"""Projections are told from other linear layers by what they do when their layer runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.calibration.gram import advance
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.linear_roles import other_roles
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model
from tests.e2e.architectures import EXPERTS, HEADS, SIZES, Architecture, save_model

CPU = torch.device("cpu")
HYBRID = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 320}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}


def stream_of(source: ModelSource) -> LayerStream:
    ids = torch.randint(2, 258, (1, 29), generator=torch.Generator().manual_seed(0))
    return LayerStream(source, text_batches(ids), CPU, torch.float32)


def save(folder: Path, config: str, options: dict[str, Any]) -> ModelSource:
    folder.mkdir()
    return ModelSource(save_model(Architecture(config, config, options), folder))


class _Scaled(nn.Linear):
    """A subclass with another computation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


class _Pair(nn.Linear):
    """A subclass that returns two values."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


def gated(up: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda mlp, x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * up(mlp, x))


def chosen(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Values of the up projection scaled by the largest softmax of it, as a router's weights are."""
    values, places = mlp.up_proj(x).softmax(-1).topk(2)
    return torch.zeros(*x.shape[:-1], 320).scatter(-1, places, values)


def positions(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """What an indexer does: only the order of its outputs counts."""
    order = (mlp.up_proj(x) @ x.new_ones(320, 4)).argsort(-1).float()
    return order.repeat_interleave(80, -1)


ROLES = {
    "read": (gated(lambda mlp, x: mlp.up_proj(x) * mlp.up_proj.weight.mean()), None, "a matrix that is read as well"),
    "not called": (gated(lambda mlp, x: x @ mlp.up_proj.weight.T), None, "a matrix that is read as well"),
    "unused": (gated(lambda _mlp, x: x.repeat(1, 1, 3)[..., :320]), None, "a layer that is never called"),
    "twice": (gated(lambda mlp, x: mlp.up_proj(mlp.up_proj(x)[..., :128])), None, "a layer that is called 2 times"),
    "keyword": (gated(lambda mlp, x: mlp.up_proj(input=x)), None, "a layer that takes or returns more than one tensor"),
    "router": (gated(chosen), None, "a router"),
    "indexer": (gated(positions), None, "used for a choice alone"),
    "another computation": (gated(lambda mlp, x: mlp.up_proj(x)), _Scaled, "a layer that is no plain GEMM"),
    "tuple": (
        *(gated(lambda mlp, x: mlp.up_proj(x)[0]), _Pair),
        "a layer that takes or returns more than one tensor",
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_linear_layers_are_known_by_what_they_do(case: str, tiny_model: Path, one_thread: None) -> None:
    forward, kind, role = ROLES[case]
    source = ModelSource(tiny_model)
    assert other_roles(stream_of(source)) == {}
    for layer in source.layers:
        mlp: Any = layer.mlp
        mlp.forward = forward.__get__(mlp)
        if kind is not None:
            mlp.up_proj.__class__ = kind
    found = other_roles(stream_of(source))
    assert found == {f"model.layers.{i}.mlp.up_proj": role for i in range(3)}


@pytest.mark.parametrize(
    ("config", "options", "leaf"),
    [
        pytest.param("PhimoeConfig", HEADS | EXPERTS | {"num_local_experts": 4}, "router", id="router"),
        pytest.param(
            "JambaConfig",
            SIZES | HYBRID | {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 8, "num_experts": 1},
            "dt_proj",
            id="state space",
        ),
    ],
)
def test_compress_leaves_other_linear_layers_dense(
    config: str, options: dict[str, Any], leaf: str, tmp_path: Path, one_thread: None
) -> None:
    source = save(tmp_path / "model", config, options)
    roles = other_roles(stream_of(source))
    assert {path.rpartition(".")[2] for path in roles} == {leaf}
    said: list[str] = []
    few = {"num_calibration_samples": 8, "max_seq_length": 64}
    compress(CompressOptions(str(source.folder), tmp_path / "out", baseline="pifa", **few), said.append)
    assert "no projections, stay dense: model.layers.*." in said[0]
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.modules
    assert not roles.keys() & checkpoint.modules.keys()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("BambaConfig", SIZES | HYBRID | STATES | {"attn_layer_indices": [1]}, id="tuples"),
        pytest.param(
            "OlmoHybridConfig",
            *[HEADS | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}],
            id="classes",
        ),
        pytest.param(
            "Gemma4TextConfig",
            HEADS | {"vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 16, "global_head_dim": 32},
            id="dictionary",
        ),
    ],
)
@torch.no_grad()
def test_unlike_layers_run_as_in_the_whole_model(
    config: str, options: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    """Layers that return tuples, of several classes, and with a dictionary that none of them reads."""
    source = save(tmp_path / "model", config, options)
    ids = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
    model = source.auto_class.from_pretrained(source.folder, dtype=torch.float32).eval()
    stream = LayerStream(source, text_batches(ids), CPU, torch.float32)
    for index in range(len(source.layers)):
        list(advance(stream, index, (), collect=False))
    source.load_lm_head(CPU, torch.float32)
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(stream.output(0, stream.flow.kept[0]).logits, expected, atol=1e-4, rtol=1e-4)


def test_layers_that_share_keys_are_refused_by_name(tmp_path: Path, one_thread: None) -> None:
    shared = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 0}
    source = save(tmp_path / "model", "Gemma4TextConfig", HEADS | shared | {"global_head_dim": 32})
    with pytest.raises(InputError, match=r"exchange more than hidden states \(model.layers.2 looks for full_attention"):
        other_roles(stream_of(source))


def test_several_hidden_states_a_token_are_refused(tmp_path: Path, one_thread: None) -> None:
    """Gemma 3n has four versions of the hidden states of every token, stacked before the batch."""
    shared = {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 16}
    source = save(tmp_path / "model", "Gemma3nTextConfig", HEADS | shared | {"vocab_size_per_layer_input": 258})
    with pytest.raises(InputError, match=r"its hidden states of \(1, \d+\) tokens are \(4, 1, \d+, \d+\): this archi"):
        stream_of(source)


def test_values_passed_on_beside_hidden_states_are_refused(tiny_model: Path, one_thread: None) -> None:
    source = ModelSource(tiny_model)
    body: Any = source.model.model
    first, second = source.layers[:2]
    plain = type(first).forward

    def with_extra(layer: Any, hidden: torch.Tensor, extra: Any = None, **kwargs: Any) -> Any:
        return plain(layer, hidden, **kwargs), hidden * 2

    class _Tuples(type(first)):  # type: ignore[misc]
        forward = with_extra

    for layer in source.layers:
        layer.__class__ = _Tuples

    def run(input_ids: torch.Tensor, **_kwargs: Any) -> Any:
        hidden, extra = body.embed_tokens(input_ids), None
        rotary = body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in source.layers:
            hidden, extra = layer(hidden, extra, position_embeddings=rotary)
        return {"logits": body.norm(hidden)}

    source.model.forward = run
    assert second is source.layers[1]
    with pytest.raises(InputError, match=r"exchange more than hidden states \(model.layers.1 takes an output"):
        stream_of(source)


def test_errors_of_the_models_code_name_the_model(tmp_path: Path, one_thread: None) -> None:
    source = ModelSource(save_tiny_model(tmp_path / "model"))
    for layer in source.layers:
        layer.self_attn.forward = lambda *_args, **_kwargs: [][0]
    with pytest.raises(InputError, match=r"does not run with other layers.*IndexError.*is not supported"):
        stream_of(source)


@pytest.mark.parametrize("change", ["reads", "changes"])
def test_models_that_use_weights_of_their_layers_are_refused(change: str, tiny_model: Path, one_thread: None) -> None:
    """RWKV rescales the weights of its layers before it runs them."""
    source = ModelSource(tiny_model)
    linear: Any = source.layers[2].mlp.down_proj

    def use(*_: Any) -> None:
        if change == "changes":
            with torch.no_grad():
                linear.weight.div_(2)
        assert linear.weight.shape

    source.model.model.rotary_emb.register_forward_pre_hook(use)
    with pytest.raises(InputError, match=f"the model {change} model.layers.2.mlp.down_proj.weight"):
        other_roles(stream_of(source))
