"""SmolLM2's real weights in real engines: against the dense model and transformers, in float32 and bf16."""

from pathlib import Path

import pytest
import torch

from tests.e2e.checkpoints import identity, transformers_logprobs, write_checkpoint
from tests.e2e.engine import NEW_TOKENS, PROMPTS, equal_length_prompts, greedy, run_engine, tokens
from tests.offline.test_compress import check_output, section_of

TOP = 5


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    return equal_length_prompts(smollm2)


@pytest.fixture(scope="module")
def smollm2_identity(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with V = I and U = W in every projection."""
    return write_checkpoint(smollm2, tmp_path_factory.mktemp("identity") / "out", identity, max_bytes=2**28)


def test_identity_factors_keep_the_dense_tokens(
    smollm2: Path, smollm2_identity: Path, prompts: list[list[int]]
) -> None:
    dense = run_engine(smollm2, [(prompts, greedy())], load_format="auto")
    factored = run_engine(smollm2_identity, [(prompts, greedy())])
    assert tokens(factored[0]) == tokens(dense[0])
    assert {len(answer) for answer in tokens(dense[0])} == {NEW_TOKENS}


# The top logits lie between 16 and 42 here, where neighbouring bf16 numbers are 1/8 or 1/4 apart:
# rounding may decide between tokens that are less than two of the wider steps apart, a near tie.
BF16_STEP = 1 / 4


def check_until_near_ties(exact: torch.Tensor, answers: list[list[int]]) -> None:
    """Every token is the most likely one or ties with it within the rounding of logits; most are the most likely.

    Args:
        exact: log probabilities in fp32 after each token of `answers` [prompts, steps, vocabulary].
    """
    best = exact.topk(2).values
    behind = best[..., 0] - exact.gather(-1, torch.tensor(answers)[..., None])[..., 0]
    assert behind.max() < 2 * BF16_STEP
    ties = (best[..., 0] - best[..., 1] < BF16_STEP).sum()
    assert (behind > 0).sum() <= ties / 2


@pytest.mark.slow
def test_bf16_identity_factors_match_until_a_near_tie(
    smollm2: Path, smollm2_identity: Path, prompts: list[list[int]]
) -> None:
    """The factored GEMMs add in another order than the dense ones, which sometimes rounds differently."""
    answers = tokens(run_engine(smollm2_identity, [(prompts, greedy())], dtype="bfloat16")[0])
    assert {len(answer) for answer in answers} == {NEW_TOKENS}
    check_until_near_ties(transformers_logprobs(smollm2, prompts, answers), answers)


@pytest.fixture(scope="module")
def compressed_fp32(smollm2_compressed: Path, prompts: list[list[int]]) -> list[list[int]]:
    # Plain `vllm serve DIR` is load format "auto": config.json alone must be enough.
    return tokens(run_engine(smollm2_compressed, [(prompts, greedy())], load_format="auto")[0])


def test_compressed_smollm2_is_complete(smollm2: Path, smollm2_compressed: Path) -> None:
    check_output(smollm2, smollm2_compressed)
    assert abs(section_of(smollm2_compressed)["ratio"]["linear"] - 0.066) <= 0.005


def test_compressed_fp32_tokens_match_transformers(
    smollm2_compressed: Path, prompts: list[list[int]], compressed_fp32: list[list[int]]
) -> None:
    # Every token is transformers' most likely one after the tokens before it: so is the whole answer.
    assert {len(answer) for answer in compressed_fp32} == {NEW_TOKENS}
    exact = transformers_logprobs(smollm2_compressed, prompts, compressed_fp32)
    assert compressed_fp32 == exact.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("number", "steps"),
    # Without bf16 instructions all prompts take minutes.
    [(4, 24), pytest.param(len(PROMPTS), NEW_TOKENS, marks=pytest.mark.slow)],
)
def test_bf16_top_logprobs_match_fp32_until_a_near_tie(
    smollm2_compressed: Path, prompts: list[list[int]], number: int, steps: int
) -> None:
    """Teacher forced on vLLM's bf16 tokens: every step is compared, also those after a different token."""
    (found,) = run_engine(smollm2_compressed, [(prompts[:number], greedy(steps, logprobs=TOP))], dtype="bfloat16")
    answers = tokens(found)
    exact = transformers_logprobs(smollm2_compressed, prompts[:number], answers)
    check_until_near_ties(exact, answers)
    shared = []
    for i, answer in enumerate(found):
        assert len(answer.logprobs) == steps
        for step, (chosen, top) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            where = f"prompt {i}, step {step}"
            five = exact[i, step].topk(TOP).indices.tolist()
            assert chosen in five, where
            assert five[0] in top, where
            shared.append(len(top.keys() & set(five)))
    assert len(shared) == number * steps
    # Places four and five are often near ties themselves.
    assert min(shared) >= 2
    assert sum(shared) / len(shared) > 4.5
