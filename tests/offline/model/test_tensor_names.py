"""Checkpoints with other tensor names, tied tensors that are stored twice, and tensors that the model lacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import CompressOptions
from tests.conftest import save_tiny_model

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3, "sensitivity": "uniform"}
TEXT = "".join(
    f"Line {i} tells of rivers, trade and music in town {i * 7 % 31}, {i % 9} days away.\n" for i in range(90)
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether the LM head is tied -> a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    return {tie: save_tiny_model(folder / str(tie), layers=2, tie=tie) for tie in (False, True)}


def changed(model: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a model with changed tensors."""
    shutil.copytree(model, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> Tensors:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def compressed(model: Path, output: Path, **options: Any) -> list[str]:
    """Compress a model; returns the printed lines."""
    text, lines = model.with_name(f"{model.name}.txt"), []
    text.write_text(TEXT, encoding="utf-8")
    compress(CompressOptions(str(model), output, dataset=(str(text),), **SMALL, **options), say=lines.append)
    return lines


def renamed(rule: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rule(name): tensor for name, tensor in tensors.items()}


RULES: dict[str, Callable[[str], str]] = {
    "without the base model's prefix": lambda n: n.removeprefix("model."),
    "DDP": lambda n: f"module.{n}",
    "torch.compile": lambda n: f"_orig_mod.{n}",
    "compiled layers": lambda n: n.replace("layers.1.", "layers.1._orig_mod."),
    "PEFT": lambda n: f"base_model.model.{n}",
    "DDP and torch.compile": lambda n: f"module._orig_mod.{n}",
    "FSDP": lambda n: f"_fsdp_wrapped_module.{n.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
    "Lightning, without prefix": lambda n: f"net.{n.removeprefix('model.')}",
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_prefixes_of_training_tools_are_removed(models: dict[bool, Path], tmp_path: Path, rule: str, tie: bool) -> None:
    folder = changed(models[tie], tmp_path / "model", renamed(RULES[rule]))
    weights, expected = ModelSource(folder).weights, load_file(models[tie] / "model.safetensors")
    assert set(weights.tensors) == set(expected)
    assert weights.unused == []
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name), tensor)
        assert torch.equal(weights.tensor(name), tensor)


def test_a_model_without_prefix_loads_in_any_dtype(models: dict[bool, Path], tmp_path: Path) -> None:
    rule = RULES["without the base model's prefix"]
    outputs = []
    for name, model in (("plain", models[False]), ("bare", changed(models[False], tmp_path / "m", renamed(rule)))):
        compressed(model, tmp_path / name)
        outputs.append(tensors_of(tmp_path / name))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.isfinite(loaded(torch.tensor([[0, 5, 9]])).logits).all()


def test_moe_experts_without_prefix_get_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=1, head_dim=16, vocab_size=64, num_experts=4, moe_intermediate_size=16,
        num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    bare = changed(tmp_path / "model", tmp_path / "bare", renamed(RULES["without the base model's prefix"]))
    for experts in (False, True):
        assert set(ModelSource(bare, experts=experts).weights.tensors) == names


def test_two_copies_of_one_tensor_are_refused(models: dict[bool, Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = changed(models[True], tmp_path / "m", lambda t: {**t, name.replace(".mlp", "._orig_mod.mlp"): t[name]})
    with pytest.raises(InputError, match=r"_orig_mod.*are both|are both"):
        ModelSource(folder)


def test_a_tied_head_is_written_once(models: dict[bool, Path], tmp_path: Path) -> None:
    folder = changed(models[True], tmp_path / "model", lambda t: {**t, HEAD: t[EMBEDDING]})
    for name, model in (("once", models[True]), ("twice", folder)):
        compressed(model, tmp_path / name)
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert HEAD not in twice
    assert once.keys() == twice.keys()
    ratios = [json.loads((tmp_path / n / "config.json").read_text())["quantization_config"]["ratio"] for n in
              ("once", "twice")]  # fmt: skip
    assert ratios[0] == ratios[1]


def test_an_untied_head_is_kept(models: dict[bool, Path]) -> None:
    assert HEAD in ModelSource(models[False]).weights.tensors


def test_a_tied_model_with_its_head_alone_is_read(models: dict[bool, Path], tmp_path: Path) -> None:
    # Tools that store shared tensors once keep either of the names.
    folder = changed(models[True], tmp_path / "model", renamed(lambda n: n.replace(EMBEDDING, HEAD)))
    weights = ModelSource(folder).weights
    assert EMBEDDING in weights.tensors
    assert HEAD not in weights.tensors
    assert torch.equal(weights.read(EMBEDDING), load_file(folder / "model.safetensors")[HEAD])


def test_a_head_that_contradicts_its_tie_is_refused(models: dict[bool, Path], tmp_path: Path) -> None:
    folder = changed(models[True], tmp_path / "model", lambda t: {**t, HEAD: t[EMBEDDING] * 2})
    with pytest.raises(InputError, match=rf"{HEAD} differs from {EMBEDDING}.*tie_word_embeddings"):
        compressed(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.txt"}


def test_layers_of_multi_token_prediction_are_kept(models: dict[bool, Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> Tensors:
        extra = {n.replace("layers.1.", "layers.2."): t for n, t in tensors.items() if "layers.1." in n}
        extra["model.layers.2.eh_proj.weight"] = torch.randn(128, 256)
        extra["mtp.fc.weight"] = torch.randn(8, 8)
        return {**tensors, **extra}

    folder = changed(models[False], tmp_path / "model", add)
    output = tmp_path / "out"
    lines = compressed(folder, output, dtype="bfloat16")
    dense, written = load_file(folder / "model.safetensors"), tensors_of(output)
    extra = [name for name in dense if name.startswith(("model.layers.2.", "mtp."))]
    assert len(extra) == 11
    for name in extra:
        assert torch.equal(written[name], dense[name].bfloat16())
    assert "11 tensors of 0.2 M parameters are not part of LlamaForCausalLM" in lines[0]
    report = json.loads((output / "pgsvd_report.json").read_text())["parameters"]
    assert report["before"] == sum(t.numel() for t in dense.values())
    assert report["after"] == sum(t.numel() for t in written.values())
    check_data(open_checkpoint(output))


def test_an_unused_tensor_that_does_not_fit_keeps_its_dtype(models: dict[bool, Path], tmp_path: Path) -> None:
    # Old checkpoints store the value of masked positions.
    name = "model.layers.0.self_attn.masked_bias"
    folder = changed(models[True], tmp_path / "model", lambda t: {**t, name: torch.tensor(-1e9)})
    compressed(folder, tmp_path / "out", dtype="float16")
    written = tensors_of(tmp_path / "out")
    assert written[name].item() == -1e9
    assert written["model.norm.weight"].dtype == torch.float16


def enlarged(name: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3] = -1e5
        return tensors

    return change


@pytest.mark.parametrize("name", ["model.norm.weight", EMBEDDING, "model.layers.1.input_layernorm.weight", HEAD])
def test_a_tensor_too_large_for_float16_is_named(models: dict[bool, Path], tmp_path: Path, name: str) -> None:
    weights = ModelSource(changed(models[False], tmp_path / "model", enlarged(name))).weights
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor {name} holds 1e\+05, float16 ends.*bfloat16"):
        weights.check_values(torch.float16)
    weights.check_values(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_no_run_begins_with_values_out_of_range(models: dict[bool, Path], tmp_path: Path, dtype: str) -> None:
    folder = changed(models[False], tmp_path / "model", enlarged("model.norm.weight"))
    if dtype == "auto":  # vLLM serves in the dtype of config.json
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(InputError, match=r"model\.norm\.weight holds 1e\+05"):
        compressed(folder, tmp_path / "out", dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.txt"}
    compressed(folder, tmp_path / "out", dtype="bfloat16")
    check_data(open_checkpoint(tmp_path / "out"))


def test_pooling_models_without_prefix_keep_their_head(tmp_path: Path) -> None:
    """Qwen3-Embedding stores a causal language model without `model.` and ties its head."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=64, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    bare = changed(tmp_path / "model", tmp_path / "bare", renamed(RULES["without the base model's prefix"]))
    assert set(ModelSource(bare).weights.tensors) == set(load_file(tmp_path / "model" / "model.safetensors"))
