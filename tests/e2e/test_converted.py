"""Checkpoints of other tools, converted and served by vLLM, against the other tool's own arithmetic."""

from pathlib import Path

import pytest
import torch

from pgsvd_vllm.cli import main
from tests.e2e.checkpoints import greedy_of
from tests.e2e.engine import greedy, run_engine, tokens
from tests.support.other_tools import TOOLS, save_as

NEW_TOKENS = 24
CORE = ("KFAC-SVD/LEMS", "PIFA")


@pytest.mark.feature("checkpoints converted from other tools")
@pytest.mark.parametrize("tool", [pytest.param(tool, marks=[] if tool in CORE else pytest.mark.slow) for tool in TOOLS])
def test_tokens_are_those_of_the_other_tool(tool: str, tiny_model: Path, tmp_path: Path) -> None:
    theirs = save_as(tool, tiny_model, tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "out")]) == 0
    prompts = torch.randint(2, 258, (6, 9), generator=torch.Generator().manual_seed(1)).tolist()
    (answers,) = run_engine(tmp_path / "out", [(prompts, greedy(NEW_TOKENS))])
    assert tokens(answers) == greedy_of(theirs, prompts, NEW_TOKENS)
    assert len({token for answer in tokens(answers) for token in answer}) > 10
