"""PEFT trains adapters on compressed models, loads them again, and merges them into a checkpoint of the same format."""

import ast
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.hf import FactoredLinear, LowRankLinear
from tests.conftest import ROOT, run_cli, save_tiny_model
from tests.e2e.checkpoints import PROJECTIONS, truncated, write_checkpoint
from tests.e2e.test_quantized import quantized

RANK = 4
IDS = torch.randint(2, 258, (8, 32), generator=torch.Generator().manual_seed(3))
PAGE = ROOT / "docs" / "finetune.md"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapted(folder: Path, **options: Any) -> Any:
    return get_peft_model(load(folder), LoraConfig(**{"r": RANK, **options}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.double()


@dataclass(frozen=True)
class Trained:
    """An adapter that was trained on every projection of a checkpoint.

    Attributes:
        base: folder of the checkpoint.
        adapter: folder of the adapter, as PEFT saved it.
        losses: of every step.
        logits: of the model with the adapter, before it was saved.
    """

    base: Path
    adapter: Path
    losses: list[float]
    logits: torch.Tensor


def train(base: Path, adapter: Path) -> Trained:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules="all-linear", lora_dropout=0.05)
    model = get_peft_model(load(base, dtype=torch.float32), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(str(adapter))
    return Trained(base, adapter, losses, logits(model.eval()))


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain factors, dense projections among them, biases, an untied LM head."""
    folder = tmp_path_factory.mktemp("factors")
    dense = save_tiny_model(folder / "dense", bias=True, tie=False, seed=5)
    return write_checkpoint(
        dense, folder / "out", lambda module, weight: None if "k_proj" in module else truncated(weight, 21)
    )


@pytest.fixture(scope="module")
def int4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory, tiny_model, "4", "factors")


@pytest.fixture(scope="module", params=["pivot", "factors", "int4"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name = {"pivot": "tiny_compressed"}.get(request.param, request.param)
    return train(request.getfixturevalue(name), tmp_path_factory.mktemp("adapter") / "adapter")


def test_training_reduces_the_loss(trained: Trained) -> None:
    assert trained.losses[-1] < 0.8 * trained.losses[0]


def test_all_linear_means_every_projection(trained: Trained) -> None:
    """The adapter has PEFT's usual names, and none for the LM head."""
    config = LlamaConfig.from_pretrained(trained.base)
    names = {
        f"base_model.model.model.layers.{layer}.{block}.{leaf}.lora_{part}.weight"
        for layer in range(config.num_hidden_layers)
        for leaf in PROJECTIONS
        for block in ["self_attn" if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"]
        for part in "AB"
    }
    assert load_file(trained.adapter / "adapter_model.safetensors").keys() == names


def dense_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in float64, with dense weights in place of factors and quantized matrices."""
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in {info.file for info in checkpoint.tensors.values()}:
        tensors |= load_file(path)
    for name, module in checkpoint.modules.items():
        parts = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in module.suffixes}
        tensors[f"{name}.weight"] = reconstruct(dequantized(parts, module.schemes))
    return {name: tensor.double() for name, tensor in tensors.items()}


def dense_logits(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    config = LlamaConfig.from_pretrained(folder)
    for key in ("quantization_config", "transformers_weights"):
        delattr(config, key)
    model: Any = LlamaForCausalLM(config).eval()
    model.to(dtype)
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    model.tie_weights()
    return logits(model)


def test_logits_are_those_of_the_dense_weights_plus_the_adapter(trained: Trained) -> None:
    base, adapter = dense_weights(trained.base), load_file(trained.adapter / "adapter_model.safetensors")
    weights = dict(base)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            a, b = adapter[name].double(), adapter[name.replace("lora_A", "lora_B")].double()
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            weights[target] = base[target] + 3 * b @ a
    exact = dense_logits(trained.base, weights, torch.float64)
    # As in test_quantizer.py: a layer of several matrices rounds several times where a dense one rounds once.
    rounding = (dense_logits(trained.base, weights, torch.float32) - exact).abs().max()
    assert 0 < rounding < 1e-4
    assert (trained.logits - exact).abs().max() <= 6 * rounding
    assert (dense_logits(trained.base, base, torch.float64) - exact).abs().max() > 0.5


def test_a_saved_adapter_loads_again(trained: Trained) -> None:
    again = PeftModel.from_pretrained(load(trained.base, dtype=torch.float32), trained.adapter)
    assert torch.equal(logits(again.eval()), trained.logits)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(trained.base, dtype=torch.float32)))


@pytest.mark.parametrize("trained", ["pivot", "factors"], indirect=True)
def test_a_merged_adapter_is_a_checkpoint_of_a_larger_rank(trained: Trained, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(load(trained.base), trained.adapter)
    merged = model.merge_and_unload(safe_merge=True).eval()
    rounding = (logits(merged) - trained.logits).abs().max()
    assert 0 < rounding < 1e-4
    merged.save_pretrained(tmp_path / "merged")

    done = run_cli("verify", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    before, after = open_checkpoint(trained.base), open_checkpoint(tmp_path / "merged")
    assert after.modules == {name: FactoredModule(row.rank + RANK) for name, row in before.modules.items()}
    # What was removed is no longer what the compressor wrote.
    assert "ratio" not in after.quantization_config
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_only_adapted_layers_change_when_merged(tiny_compressed: Path, tmp_path: Path) -> None:
    model = adapted(tiny_compressed, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True)
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    before, after = open_checkpoint(tiny_compressed).modules, open_checkpoint(tmp_path / "merged").modules
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "q_proj" in name}
    assert torch.allclose(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_two_adapters_are_merged_at_once(factors: Path) -> None:
    model = adapted(factors, target_modules="all-linear", init_lora_weights=False)
    one = logits(model)
    # A second `all-linear` finds the layers that have an adapter.
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert (both - one).abs().max() > 0.5
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), both, rtol=0, atol=1e-4)
    ranks = {module.rank for module in merged.modules() if isinstance(module, FactoredLinear)}
    assert ranks == {21 + RANK + 2}


def test_quantized_matrices_are_not_merged(int4: Path) -> None:
    model = adapted(int4, target_modules="all-linear", init_lora_weights=False)
    before = logits(model)
    with pytest.raises(InputError, match=r"model\.layers\.0\.\S+: adapters cannot be merged into quantized .*serve"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_what_needs_dense_weights_is_refused(tiny_compressed: Path) -> None:
    for options, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' needs dense weights"),
        ({"use_dora": True}, "use_dora"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted(tiny_compressed, target_modules=["q_proj"], **options)
    model = adapted(tiny_compressed, target_modules=["q_proj"])
    with pytest.raises(InputError, match="merge_and_unload"):
        model.merge_adapter()
    biased = adapted(tiny_compressed, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(InputError, match="lora_bias"):
        biased.merge_and_unload()


def test_a_broken_adapter_is_not_merged(tiny_compressed: Path) -> None:
    model = adapted(tiny_compressed, target_modules=["q_proj"], init_lora_weights=False)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(InputError, match="adapter default: .* NaN"):
        model.merge_and_unload(safe_merge=True)


def test_adapters_of_transformers_itself(tiny_compressed: Path, tmp_path: Path) -> None:
    """add_adapter, save_pretrained and load_adapter of the model."""
    model = load(tiny_compressed)
    model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = load(tiny_compressed)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("form", ["pivot", "factors"])
def test_adapters_of_the_factors_keep_rank_and_form(
    form: str, tiny_compressed: Path, factors: Path, tmp_path: Path
) -> None:
    base = tiny_compressed if form == "pivot" else factors
    parameters = ["weight_p", "weight_c"] if form == "pivot" else ["weight_v", "weight_u"]
    model = adapted(base, target_modules=[], target_parameters=parameters)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = logits(model)
    assert (expected - logits(load(base))).abs().max() > 0.1
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").quantization_config == open_checkpoint(base).quantization_config
    assert torch.allclose(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_the_trainer_trains_the_factors_themselves(tiny_compressed: Path, int4: Path, tmp_path: Path) -> None:
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path / "runs"), max_steps=4, learning_rate=1e-3, use_cpu=True, report_to="none", save_strategy="no"
    )
    model = load(tiny_compressed)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    before, after = dict(load(tiny_compressed).named_parameters()), dict(load(tmp_path / "tuned").named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith(("weight_p", "weight_c")))
    assert torch.equal(logits(load(tmp_path / "tuned")), logits(model.eval()))
    assert open_checkpoint(tmp_path / "tuned").modules == open_checkpoint(tiny_compressed).modules
    # Packed matrices have no gradients: training the rest alone would go unnoticed.
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(int4), arguments, train_dataset=rows)


def test_models_load_where_peft_is_not_installed(tiny_compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load(tiny_compressed))
    monkeypatch.delitem(sys.modules, "pgsvd_vllm.hf.peft_compat")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert torch.equal(logits(load(tiny_compressed)), expected)
    assert "pgsvd_vllm.hf.peft_compat" not in sys.modules


def test_one_file_imports_peft() -> None:
    found = [
        path.name
        for folder in ("pgsvd_vllm", "offline")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        if name.split(".")[0] == "peft"
    ]
    assert set(found) == {"peft_compat.py"}


def test_the_page_on_fine_tuning_runs(tiny_compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python blocks, one after the other, in a folder with DIR and a text."""
    shutil.copytree(tiny_compressed, tmp_path / "DIR")
    (tmp_path / "train.txt").write_text("".join(f"The sum of {i} and {i} is {2 * i}.\n" for i in range(40)))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    for folder in ("MERGED", "SMALL", "TUNED"):
        assert Path(folder, "tokenizer.json").is_file()
        assert any(isinstance(module, LowRankLinear) for module in load(Path(folder)).modules())
    before, small, merged = (open_checkpoint(folder).modules for folder in ("DIR", "SMALL", "MERGED"))
    assert small == before
    assert merged == {name: FactoredModule(module.rank + 16) for name, module in before.items()}
