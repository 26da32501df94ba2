"""Quantized factors in real engines, against transformers on the same folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.format.reader import open_checkpoint
from tests.conftest import compress_to, made_once
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.e2e.checkpoints import transformers_greedy, transformers_logprobs
from tests.e2e.engine import Answer, greedy, one_core_each, run_engine, tokens, try_engine
from tests.e2e.test_lora import RANK, adapted, load, write_adapter

NEW_TOKENS = 24
# Largest and mean difference of log probabilities in nats, where activations are quantized per token, or in bf16.
LARGEST, MEAN = 0.4, 0.04


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (6, 9), generator=generator).tolist()


def quantized(factory: pytest.TempPathFactory, model: Path, bits: str, form: str, ratio: float = 0.25) -> Path:
    """The tiny model, a quarter of its parameters removed and the rest quantized."""
    options = ("--ratio", str(ratio), "--num-calibration-samples", "32", "--max-seq-length", "64", "--refine", "0")
    options += ("--dataset", "python-docs", "--bits", bits, "--form", form)
    return made_once(factory, f"tiny-{bits}-{form}-{ratio}", lambda output: compress_to(output, model, *options))


@pytest.fixture(scope="module")
def int8(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory, tiny_model, "8", "factors")


def check_logprobs(found: Sequence[Answer], expected: torch.Tensor) -> None:
    """The engine's log probabilities of its top tokens, against [prompts, steps, vocabulary]."""
    differences = [
        abs(logprob - float(expected[prompt, step, token]))
        for prompt, one in enumerate(found)
        for step, top in enumerate(one.logprobs)
        for token, logprob in top.items()
    ]
    assert len(differences) >= 5 * NEW_TOKENS * len(found)
    assert max(differences) < LARGEST
    assert sum(differences) / len(differences) < MEAN


@pytest.mark.feature("quantized factors: INT4 weights, 16-bit activations")
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_int4_matches_transformers(
    form: str, tiny_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = quantized(tmp_path_factory, tiny_model, "4", form)
    (answers,) = run_engine(folder, [(prompts, greedy(NEW_TOKENS, logprobs=5))], dtype="bfloat16")
    check_logprobs(answers, transformers_logprobs(folder, prompts, tokens(answers)))
    # In float32 the matrices are dequantized.
    (exact,) = run_engine(folder, [(prompts, greedy(NEW_TOKENS))])
    assert tokens(exact) == transformers_greedy(folder, prompts, NEW_TOKENS)


@pytest.mark.feature("quantized factors: INT8 weights and activations")
@pytest.mark.parametrize("options", [{}, {"load_format": "auto"}, {"enforce_eager": False}], ids=str)
def test_int8_matches_transformers(int8: Path, prompts: list[list[int]], options: dict[str, object]) -> None:
    (answers,) = run_engine(int8, [(prompts, greedy(NEW_TOKENS, logprobs=5))], dtype="bfloat16", **options)
    check_logprobs(answers, transformers_logprobs(int8, prompts, tokens(answers)))
    assert len({token for answer in tokens(answers) for token in answer}) > 10


@pytest.mark.feature("quantized factors: INT8 in the pivot form, FP8")
@pytest.mark.parametrize(("bits", "form"), [("8", "pivot"), ("fp8", "factors"), ("fp8", "pivot")])
def test_other_kinds_match_transformers(
    bits: str, form: str, tiny_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = quantized(tmp_path_factory, tiny_model, bits, form)
    (answers,) = run_engine(folder, [(prompts, greedy(NEW_TOKENS, logprobs=5))], dtype="bfloat16")
    check_logprobs(answers, transformers_logprobs(folder, prompts, tokens(answers)))


@pytest.mark.feature("quantized factors: ranks and bits chosen together")
@pytest.mark.parametrize(("ranks", "ratio"), [(1, 0.85), (2, 0.87)])
def test_a_model_of_several_kinds_matches_transformers(
    ranks: int, ratio: float, tiny_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = quantized(tmp_path_factory, tiny_model, "auto", "factors", ratio)
    modules = open_checkpoint(folder).modules.values()
    kinds = {(module.is_dense, *{scheme.key for scheme in module.schemes.values()}) for module in modules}
    assert len(kinds) > 2
    # Some groups are wider than a rank's inputs.
    assert ranks == 1 or ((False, "int4-32") in kinds and (True, "int4-128") in kinds)
    job = (prompts, greedy(NEW_TOKENS, logprobs=5))
    done = try_engine(folder, [job], dtype="bfloat16", tensor_parallel_size=ranks, environment=one_core_each())
    assert done.returncode == 0, done.log[-6000:]
    check_logprobs(done.answers[0], transformers_logprobs(folder, prompts, tokens(done.answers[0])))


@pytest.mark.feature("quantized factors: fused, interleaved and transposed layers, a shared expert's gate")
@pytest.mark.parametrize("config", ["Phi3Config", "FalconConfig", "GPT2Config", "Qwen2MoeConfig"])
@pytest.mark.parametrize("bits", [pytest.param("8", marks=pytest.mark.slow), "4"])
def test_architectures_match_transformers(bits: str, config: str, prompts: list[list[int]], tmp_path: Path) -> None:
    row = next(row for row in ARCHITECTURES if row.config == config)
    model = save_model(row, tmp_path / "model")
    options = ("--ratio", "0.25", "--num-calibration-samples", "32", "--max-seq-length", "64", "--refine", "0")
    options += ("--dataset", "python-docs", "--bits", bits, "--form", "factors")
    compress_to(tmp_path / "out", model, *options)
    # Some layers are factored and some quantized alone.
    assert len({module.is_dense for module in open_checkpoint(tmp_path / "out").modules.values()}) == 2
    job = (prompts, greedy(NEW_TOKENS, logprobs=5))
    (answers,) = run_engine(tmp_path / "out", [job], **(row.engine | {"dtype": "bfloat16"}))
    check_logprobs(answers, transformers_logprobs(tmp_path / "out", prompts, tokens(answers)))


@pytest.mark.feature("quantized factors: tensor parallelism, 2 ranks")
@pytest.mark.parametrize("bits", ["8", "4"])
def test_two_ranks_match_transformers(
    bits: str, tiny_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = quantized(tmp_path_factory, tiny_model, bits, "factors")
    done = try_engine(
        folder,
        [(prompts, greedy(NEW_TOKENS, logprobs=5))],
        dtype="bfloat16",
        tensor_parallel_size=2,
        environment=one_core_each(),
    )
    assert done.returncode == 0, done.log[-6000:]
    check_logprobs(done.answers[0], transformers_logprobs(folder, prompts, tokens(done.answers[0])))


@pytest.mark.feature("quantized factors: LoRA")
def test_an_adapter_matches_transformers(int8: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    adapter = write_adapter(load(int8), tmp_path / "adapter", seed=10)
    job = (prompts, greedy(NEW_TOKENS, logprobs=5), [str(adapter)] * len(prompts))
    (answers,) = run_engine(int8, [job], dtype="bfloat16", enable_lora=True, max_loras=1, max_lora_rank=RANK)
    model = adapted(load(int8), adapter)
    with torch.no_grad():
        rows = [
            model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for prompt, answer in zip(prompts, tokens(answers), strict=True)
        ]
    check_logprobs(answers, torch.stack(rows))


@pytest.mark.feature("quantized factors: weights reloaded into a running engine")
def test_weights_reload(int8: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    other = Path(shutil.copytree(int8, tmp_path / "other"))
    (path,) = other.glob("*.safetensors")
    weights = load_file(path)
    for name, tensor in weights.items():
        if name.endswith("_scale"):
            tensor *= 1.05
        elif name.endswith("weight_u_packed"):
            tensor.neg_()
    save_file(weights, path, metadata={"format": "pt"})
    job = (prompts, greedy(NEW_TOKENS))
    (first,), (second,) = (run_engine(folder, [job], dtype="bfloat16") for folder in (int8, other))
    assert tokens(first) != tokens(second)
    reloaded = run_engine(int8, [job], dtype="bfloat16", reload=other)
    assert [tokens(one) for one in reloaded] == [tokens(first), tokens(second)]
