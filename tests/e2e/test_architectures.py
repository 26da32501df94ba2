"""Every architecture: a tiny random model is compressed, verified and served by vLLM like by transformers."""

import json
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.cli import main
from pgsvd_vllm.families import TESTED
from pgsvd_vllm.format.reader import open_checkpoint
from tests.e2e.architectures import ARCHITECTURES, BF16, Architecture, save_model
from tests.e2e.checkpoints import reconstruct_dense, transformers_logprobs
from tests.e2e.engine import greedy, run_engine, tokens
from tests.e2e.vision_models import VISION_MODELS
from tests.models import DOCUMENT, rows

NEW_TOKENS = 24
# Nats: logits of these models are below 20, where float32 numbers are 2e-6 apart, and sum some hundred terms.
FP32_TIE = 1e-4
# Nats that the tokens of a bf16 engine are behind transformers' float32 ones, on average. Two modules of one shape in
# each other's place give 0.25.
BF16_LOSS = 0.03
FEW = ("--num-calibration-samples", "32", "--max-seq-length", "64")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (8, 9), generator=generator).tolist()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(row, id=row.name, marks=() if row.core else pytest.mark.slow) for row in ARCHITECTURES],
)
def test_compressed_model_matches_transformers(
    architecture: Architecture, prompts: list[list[int]], tmp_path: Path, one_thread: None
) -> None:
    """Compress with chosen ranks, and with every projection factored; vLLM serves the second checkpoint."""
    model = save_model(architecture, tmp_path / "model")
    experts = ("--include", "experts") if architecture.experts else ()
    for output, options in ((tmp_path / "chosen", ()), (tmp_path / "all", ("--baseline", "pifa", *experts))):
        assert main(["compress", str(model), "-o", str(output), "--ratio", "0.25", *FEW, *options]) == 0
        assert main(["verify", str(output)]) == 0
    chosen, served = (open_checkpoint(tmp_path / name).modules for name in ("chosen", "all"))
    assert chosen
    report = json.loads((tmp_path / "all" / "pgsvd_report.json").read_text(encoding="utf-8"))["modules"]
    assert served.keys() <= {row["name"] for row in report}
    # A single row, such as the shared expert's gate, has no low rank.
    assert {row["name"] for row in report if row["rank"] is None} == {
        row["name"] for row in report if row["out_features"] == 1
    }
    assert not {name.rpartition(".")[2] for name in served} & architecture.dense
    assert any(".experts." in name for name in served) == architecture.experts
    job = (prompts, greedy(NEW_TOKENS))
    found = tokens(run_engine(tmp_path / "all", [job], **architecture.engine)[0])
    if architecture.like_transformers:
        exact = transformers_logprobs(tmp_path / "all", prompts, found)
        if architecture.engine == BF16:
            assert behind(exact, found).mean() <= BF16_LOSS
        else:
            check_greedy(exact, found)
    else:
        dense = reconstruct_dense(tmp_path / "all", tmp_path / "back")
        assert found == tokens(run_engine(dense, [job], load_format="auto", **architecture.engine)[0])
    assert {len(answer) for answer in found} == {NEW_TOKENS}
    # A model that repeats one answer for every prompt would hide errors.
    assert len({token for answer in found for token in answer}) > 7


def check_greedy(exact: torch.Tensor, answers: list[list[int]]) -> None:
    """Every token is transformers' most likely one after the tokens before it, or ties with it in float32.

    Args:
        exact: log probabilities after each token of `answers` [prompts, steps, vocabulary].
    """
    nats = behind(exact, answers)
    assert nats.max() <= FP32_TIE
    assert (nats > 0).sum() <= 2


def behind(exact: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
    """How many nats every token is less likely than the most likely one [prompts, steps]."""
    return exact.max(-1).values - exact.gather(-1, torch.tensor(answers)[..., None])[..., 0]


def test_models_md_lists_every_architecture() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [row for row in rows() if row not in text]
    assert not missing, "run: python tests/models.py"


def test_tested_architectures_are_those_of_the_document() -> None:
    """`compress` warns of an architecture exactly where docs/models.md has no row for it."""
    import transformers

    configs = [getattr(transformers, row.config) for row in (*ARCHITECTURES, *VISION_MODELS)]
    assert set(TESTED) == {config.model_type for config in configs}
