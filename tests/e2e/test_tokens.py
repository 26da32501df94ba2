"""Tokens of tiny models in real engines: against transformers, compiled, on two ranks."""

import re
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.parallel.preview import preview
from tests.conftest import ROOT, save_tiny_model
from tests.e2e.checkpoints import Factors, transformers_greedy, transformers_logprobs, truncated, write_checkpoint
from tests.e2e.engine import NEW_TOKENS, greedy, one_core_each, run_engine, tokens, try_engine


@pytest.fixture(scope="module")
def tiny_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (8, 9), generator=generator).tolist()


def pattern(module: str, weight: torch.Tensor) -> Factors | None:
    """Every mix of dense and low-rank shards; ranks of all kinds, also odd ones and full rank."""
    layer, leaf = int(module.split(".")[2]), module.rpartition(".")[2]
    ranks = [
        {"q_proj": 48, "v_proj": 17, "up_proj": 80},
        {},
        {"k_proj": 32, "o_proj": 40, "gate_proj": 33, "down_proj": 64},
        {"q_proj": 31, "k_proj": 9, "v_proj": 64, "o_proj": 128, "gate_proj": 50, "up_proj": 1, "down_proj": 77},
    ][layer]
    return truncated(weight, ranks[leaf]) if leaf in ranks else None


@pytest.fixture(scope="module", params=["tied", "untied-bias"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four layers with every mix of shards; with and without biases, tied and not."""
    folder = tmp_path_factory.mktemp("mixed")
    with_bias = request.param == "untied-bias"
    dense = save_tiny_model(folder / "dense", bias=with_bias, tie=not with_bias, layers=4, seed=3)
    return write_checkpoint(dense, folder / "out", pattern)


def test_mixed_shards_match_transformers(mixed: Path, tiny_prompts: list[list[int]]) -> None:
    expected = transformers_greedy(mixed, tiny_prompts, NEW_TOKENS)
    answers = run_engine(mixed, [(tiny_prompts, greedy()), (tiny_prompts[:1], greedy())])
    assert tokens(answers[0]) == expected
    # A batch of one takes other kernels than a batch of eight.
    assert tokens(answers[1]) == expected[:1]
    # A model that repeats one token would hide errors in later steps.
    assert len({token for answer in expected for token in answer}) > 20


@pytest.fixture(scope="module")
def tiny_eager(tiny_compressed: Path, tiny_prompts: list[list[int]]) -> list[list[int]]:
    return tokens(run_engine(tiny_compressed, [(tiny_prompts, greedy())])[0])


@pytest.mark.feature("torch.compile")
def test_compiled_tokens_equal_eager_ones(
    tiny_compressed: Path, tiny_prompts: list[list[int]], tiny_eager: list[list[int]], tmp_path: Path
) -> None:
    done = try_engine(
        tiny_compressed,
        [(tiny_prompts, greedy())],
        enforce_eager=False,
        # An empty cache: what is tested is compiling, not loading an earlier result.
        environment={"VLLM_CACHE_ROOT": str(tmp_path)},
    )
    assert done.returncode == 0, done.log[-6000:]
    compiled = list((tmp_path / "torch_compile_cache").rglob("*.py"))
    assert compiled, f"nothing was compiled:\n{done.log[-6000:]}"
    assert tokens(done.answers[0]) == tiny_eager


def told_of_ranks(log: str) -> set[tuple[float, str, int, int]]:
    """(MB of factored layers, their cuts, elements sent per token, those of dense layers), from the ranks' log."""
    sent = r"send (\d+) elements per token between ranks, dense layers (\d+)"
    pattern = rf"hold ([\d.]+) MB on this rank \((.*?)\) and {sent}"
    return {(float(mb), cuts, int(sent), int(dense)) for mb, cuts, sent, dense in re.findall(pattern, log)}


@pytest.mark.feature("tensor parallelism, 2 ranks")
def test_two_ranks_keep_the_tokens_of_one(
    tiny_compressed: Path, tiny_prompts: list[list[int]], tiny_eager: list[list[int]]
) -> None:
    done = try_engine(
        tiny_compressed,
        [(tiny_prompts, greedy())],
        tensor_parallel_size=2,
        environment=one_core_each(),
    )
    assert done.returncode == 0, done.log[-6000:]
    assert tokens(done.answers[0]) == tiny_eager
    # No matrix of so small a model is worth one more collective.
    assert {re.sub(r"\d", "n", cuts) for _, cuts, _, _ in told_of_ranks(done.log)} == {"n all_reduce_z, n replicated"}


@pytest.mark.feature("tensor parallelism, factors cut by rank rows")
def test_two_ranks_hold_half_and_send_no_more_than_dense(tiny_prompts: list[list[int]], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=8, bias=True)
    factored = write_checkpoint(
        model, tmp_path / "out", lambda _, weight: truncated(weight, int(0.55 * weight.numel() / sum(weight.shape)))
    )
    stored = open_checkpoint(factored)
    total = sum(
        stored.tensors[f"{name}.{suffix}"].nbytes for name, m in stored.modules.items() for suffix in m.suffixes
    )
    (one,) = run_engine(factored, [(tiny_prompts, greedy())])
    done = try_engine(
        factored,
        [(tiny_prompts, greedy())],
        tensor_parallel_size=2,
        environment={**one_core_each(), "PGSVD_COLLECTIVE_BYTES": "0"},
    )
    assert done.returncode == 0, done.log[-6000:]
    assert tokens(done.answers[0]) == tokens(one)
    told = told_of_ranks(done.log)
    assert len(told) in (1, 2), done.log[-6000:]
    planned = list(preview(stored, 2, 0))
    for megabytes, cuts, sent, dense in told:
        # `pgsvd-vllm inspect --tp 2` shows the same.
        assert abs(1e6 * megabytes - sum(plan.here for plan in planned)) <= 1000
        assert (sent, dense) == (sum(plan.sent for plan in planned), sum(plan.dense for plan in planned))
        assert {"all_gather_z", "all_reduce_z_gather_y"} <= set(re.findall("[a-z_]+", cuts)), cuts
        assert 1e6 * megabytes <= 0.55 * total
        assert sent <= dense == 8 * 2 * 2 * 128


def test_vllm_serves_a_checkpoint_of_format_version_1(tiny_prompts: list[list[int]]) -> None:
    """Written by the program before the format's code was split; its logits are nearly flat, so all are compared."""
    folder = ROOT / "tests" / "data" / "checkpoint_v1"
    (answers,) = run_engine(folder, [(tiny_prompts, greedy(4, logprobs=20))], max_logprobs=20)
    exact = transformers_logprobs(folder, tiny_prompts, tokens(answers))
    for prompt, answer in enumerate(answers):
        for step, found in enumerate(answer.logprobs):
            assert len(found) == 20
            for token, logprob in found.items():
                assert logprob == pytest.approx(float(exact[prompt, step, token]), abs=1e-3)
