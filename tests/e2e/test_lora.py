"""LoRA adapters on a compressed model, or merged into it: real engines against transformers with the same adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.format.reader import open_checkpoint
from tests.e2e.checkpoints import PROJECTIONS, greedy_of, transformers_greedy
from tests.e2e.engine import NEW_TOKENS, greedy, run_engine, tokens

RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (6, 9), generator=generator).tolist()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(model: Any, folder: Path, seed: int) -> Path:
    """An adapter in PEFT's format on every projection, strong enough to change the tokens."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(PROJECTIONS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapted(model: Any, adapter: Path) -> Any:
    """The model, every projection's output plus the adapter's."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        a = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            b = tensors[f"base_model.model.{name}.lora_B.weight"] * (ALPHA / RANK)
            module.register_forward_hook(lambda _m, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
    return model


@pytest.fixture(scope="module")
def expected(
    tiny_compressed: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]]]:
    """Folder of an adapter, or "" for the base -> transformers' tokens."""
    base, folder = load(tiny_compressed), tmp_path_factory.mktemp("adapters")
    adapters = [write_adapter(base, folder / name, seed) for seed, name in enumerate(("first", "second"), 10)]
    said = {str(path): greedy_of(adapted(load(tiny_compressed), path), prompts, NEW_TOKENS) for path in adapters}
    said[""] = transformers_greedy(tiny_compressed, prompts, NEW_TOKENS)
    # For every prompt the base and both adapters have different tokens.
    for i in range(len(prompts)):
        assert len({tuple(answers[i]) for answers in said.values()}) == 3
    return said


@pytest.mark.feature("LoRA: two adapters and the base in one batch")
def test_two_adapters_and_the_base_in_one_batch(
    tiny_compressed: Path, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    first, second, _ = expected
    # Each prompt meets the base and both adapters, in batches that mix them.
    rounds = [[first, second, ""] * 2, [second, "", first] * 2, ["", first, second] * 2]
    answers = run_engine(
        tiny_compressed,
        [(prompts, greedy(), chosen) for chosen in rounds],
        enable_lora=True,
        # One more than there are: vLLM 0.32 on CPU gives requests without an adapter that of the last slot.
        max_loras=3,
        max_lora_rank=RANK,
    )
    for chosen, answer in zip(rounds, answers, strict=True):
        assert tokens(answer) == [expected[adapter][i] for i, adapter in enumerate(chosen)]


@pytest.mark.feature("LoRA: adapters swapped in one slot")
def test_adapters_take_turns_in_one_slot(
    tiny_compressed: Path, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    first, second, _ = expected
    turns = [first, second, first]
    answers = run_engine(
        tiny_compressed,
        [(prompts, greedy(), [adapter] * len(prompts)) for adapter in turns],
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=2,
        max_lora_rank=RANK,
    )
    assert [tokens(answer) for answer in answers] == [expected[adapter] for adapter in turns]


@pytest.fixture(scope="module")
def tuned(
    tiny_compressed: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[list[int]]]:
    """An adapter that PEFT trained, the checkpoint with this adapter merged, and PEFT's tokens."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(4)
    # vLLM fuses q, k and v, and gate and up: one of them keeps its form when the adapter is merged.
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model: Any = get_peft_model(load(tiny_compressed), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(2, 258, (16, 32))
    for _ in range(20):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")
    said = greedy_of(model.get_base_model(), prompts, NEW_TOKENS)
    base = transformers_greedy(tiny_compressed, prompts, NEW_TOKENS)
    assert all(one != other for one, other in zip(said, base, strict=True))
    assert len({token for row in said for token in row}) > 20
    model.merge_and_unload().save_pretrained(folder / "merged")
    for path in tiny_compressed.glob("tokenizer*"):
        shutil.copyfile(path, folder / "merged" / path.name)
    return folder / "adapter", folder / "merged", said


@pytest.mark.feature("LoRA: an adapter trained by PEFT on the compressed model")
def test_a_trained_adapter_matches_peft(
    tiny_compressed: Path, prompts: list[list[int]], tuned: tuple[Path, Path, list[list[int]]]
) -> None:
    adapter, _, expected = tuned
    job = (prompts, greedy(), [str(adapter)] * len(prompts))
    (answers,) = run_engine(tiny_compressed, [job], enable_lora=True, max_lora_rank=RANK)
    assert tokens(answers) == expected


@pytest.mark.feature("LoRA: an adapter merged into the factors")
def test_a_merged_adapter_matches_peft(
    tiny_compressed: Path, prompts: list[list[int]], tuned: tuple[Path, Path, list[list[int]]]
) -> None:
    _, merged, expected = tuned
    assert {module.form for module in open_checkpoint(tiny_compressed).modules.values()} == {"pivot"}
    assert {module.form for module in open_checkpoint(merged).modules.values()} == {"pivot", "factors"}
    (answers,) = run_engine(merged, [(prompts, greedy())])
    assert tokens(answers) == expected
