"""Checkpoints of other tools become servable with their own factors, or one error names what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.convert.convert import convert
from tests.conftest import save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.support.other_tools import NAMES, RANK, TOOLS, factors_of, save_as

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("biased") / "model", bias=True, tie=False)


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(40).view(2, 20) + 3).logits


@pytest.mark.parametrize("tool", TOOLS)
def test_the_converted_model_computes_the_same(tool: str, tiny_model: Path, tmp_path: Path) -> None:
    theirs = save_as(tool, tiny_model, tmp_path / "theirs")
    made = convert(tmp_path / "theirs", tmp_path / "out")
    assert (made.tool, made.projections, made.has_tokenizer) == (tool, 20, True)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {module.rank for module in checkpoint.modules.values()} == {RANK}
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in checkpoint.config
    with torch.no_grad():
        expected = theirs(torch.arange(40).view(2, 20) + 3).logits
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("tool", [name for name in NAMES if name != "Dobi-SVD"])
def test_factors_and_biases_are_the_same_numbers(tool: str, biased: Path, tmp_path: Path) -> None:
    theirs = save_as(tool, biased, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "pgsvd-00001-of-00001.safetensors")
    for name in open_checkpoint(tmp_path / "out").modules:
        layer = theirs.get_submodule(name)
        assert torch.equal(stored[f"{name}.weight_v"], layer.v)
        assert torch.equal(stored[f"{name}.weight_u"], layer.u)
        assert torch.equal(stored[f"{name}.bias"], layer.bias)
    with torch.no_grad():
        expected = theirs(torch.arange(40).view(2, 20) + 3).logits
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


def test_the_command_names_the_tool_and_how_to_serve(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_as("KFAC-SVD/LEMS", tiny_model, tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "20 projections as KFAC-SVD/LEMS factored them" in printed
    assert f"vllm serve {tmp_path / 'out'} --load-format pgsvd" in printed
    assert open_checkpoint(tmp_path / "out").quantization_config["base_model"] == "someone/tiny-llama"
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "converted from KFAC-SVD/LEMS" in capsys.readouterr().out


def test_config_and_tokenizer_of_the_base(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = save_as("SVD-LLM", tiny_model, tmp_path / "theirs")
    for path in tmp_path.glob("theirs/*token*"):
        path.unlink()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "svd_llm"}')
    assert main(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "out")]) == 2
    assert "name the dense model with --base" in capsys.readouterr().err
    arguments = ["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "out"), "--base", str(tiny_model)]
    assert main(arguments) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with torch.no_grad():
        expected = theirs(torch.arange(40).view(2, 20) + 3).logits
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


def test_a_factored_head_is_untied(tiny_model: Path, tmp_path: Path) -> None:
    theirs = save_as("ASVD", tiny_model, tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    head = torch.randn(258, 20), torch.randn(20, 128)
    tensors["lm_head.ALinear.weight"], tensors["lm_head.BLinear.weight"] = head
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    convert(tmp_path / "theirs", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.head == "lm_head"
    assert checkpoint.config["tie_word_embeddings"] is False
    with torch.no_grad():
        hidden = theirs.model(torch.arange(40).view(2, 20) + 3).last_hidden_state
    expected = hidden @ head[1].T @ head[0].T
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


def test_gpt2_stores_the_other_weights_transposed(tmp_path: Path) -> None:
    row = next(row for row in ARCHITECTURES if row.config == "GPT2Config")
    dense = save_model(row, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        stored = next(key for key in tensors if name.endswith(key.removesuffix(".weight")) and key.endswith("weight"))
        v, u = factors_of(tensors.pop(stored).T)
        tensors[f"{name}.BLinear.weight"], tensors[f"{name}.ALinear.weight"] = v, u
        model.get_submodule(name).weight.data = (u @ v).T.contiguous()
    save_file(tensors, dense / "model.safetensors")
    assert convert(dense, tmp_path / "out").projections == 2
    with torch.no_grad():
        expected = model(torch.arange(40).view(2, 20) + 3).logits
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


def test_an_moe_keeps_its_experts(tmp_path: Path) -> None:
    row = next(row for row in ARCHITECTURES if row.config == "Qwen2MoeConfig")
    dense = save_model(row, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    name = "model.layers.0.self_attn.o_proj"
    v, u = factors_of(tensors.pop(f"{name}.weight"))
    tensors[f"{name}.mod_a.weight"], tensors[f"{name}.mod_b.weight"] = v, u.bfloat16()
    model.get_submodule(name).weight.data = u.bfloat16().float() @ v
    save_file(tensors, dense / "model.safetensors")
    convert(dense, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "pgsvd-00001-of-00001.safetensors")
    assert {stored[f"{name}.weight_u"].dtype, stored[f"{name}.weight_v"].dtype} == {torch.float32}
    with torch.no_grad():
        expected = model(torch.arange(40).view(2, 20) + 3).logits
    assert torch.allclose(logits_of(tmp_path / "out"), expected, atol=1e-4 * expected.abs().max().item())


def test_tensors_alone_beside_the_base(tiny_model: Path, tmp_path: Path) -> None:
    save_as("SVD-LLM", tiny_model, tmp_path / "theirs")
    for path in list((tmp_path / "theirs").iterdir()):
        if path.suffix != ".safetensors":
            path.unlink()
    assert convert(tmp_path / "theirs", tmp_path / "out", tiny_model).has_tokenizer


def test_pifa_with_one_of_two_indices_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_as("PIFA", tiny_model, tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    del tensors[f"{Q}.true_idx"]
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {Q}.true_idx, a part of {Q}"):
        convert(tmp_path / "theirs", tmp_path / "out")


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (drop(f"{Q}.ALinear.weight"), f"{Q}.ALinear.weight, a part of {Q} (ASVD), is missing"),
        (put(f"{Q}.ALinear.weight", torch.ones(127, RANK)), f"are no factors of {Q} (128, 128)"),
        (put(f"{Q}.ALinear.weight", torch.full((128, RANK), torch.nan)), f"{Q}.ALinear.weight holds NaN"),
        (put(f"{Q}.ALinear.weight", torch.ones(128, RANK, dtype=torch.int8)), f"{Q}.ALinear.weight has dtype I8"),
        (put(f"{Q}.weight", torch.ones(128, 128)), f"{Q}.weight is stored beside its own factors"),
        (put("model.layers.0.more.weight", torch.ones(4)), "model.layers.0.more.weight belongs neither"),
        (put("lm_head.weight", torch.ones(258, 128)), "lm_head.weight differs from model.embed_tokens.weight"),
        (drop("model.norm.weight"), "model.norm.weight of LlamaForCausalLM is missing"),
        (put("model.norm.weight", torch.ones(64)), "model.norm.weight has shape (64,), not (128,)"),
        (drop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight of LlamaForCausalLM is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(
    change: Callable[[Tensors], None], culprit: str, tiny_model: Path, tmp_path: Path
) -> None:
    save_as("ASVD", tiny_model, tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(InputError) as refused:
        convert(tmp_path / "theirs", tmp_path / "out")
    assert culprit in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_rows_that_are_not_those_of_one_weight_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_as("PIFA", tiny_model, tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors[f"{Q}.false_idx"][0] = tensors[f"{Q}.false_idx"][1]
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(InputError, match=r"false_idx and .* are not the 128 rows of one weight"):
        convert(tmp_path / "theirs", tmp_path / "out")


def test_a_dense_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no low-rank factors under the names of ASVD, Basis Sharing"):
        convert(tiny_model, tmp_path / "out")


def test_our_own_checkpoint_is_refused(tiny_compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already compressed"):
        convert(tiny_compressed, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "advice"), [("whitening.pt", "save_file"), ("remapping_weight.pt", "without remapping")]
)
def test_pickles_are_refused_with_the_safe_way(name: str, advice: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "theirs" / name).write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=advice):
        convert(tmp_path / "theirs", tmp_path / "out")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="merge it into its base first"):
        convert(tmp_path, tmp_path / "out")
