"""Calibration text that is worth nothing, or little."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.text import builtin_prose, load_tokenizer
from pgsvd_vllm.offline.data.text_worth import check_worth
from pgsvd_vllm.offline.data.tokens import TokenizedText, Windows, cut_windows, tokenize

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def cut(tokenizer: PreTrainedTokenizerBase, text: str, windows: int = 16) -> Windows:
    return cut_windows(tokenize(tokenizer, [text], "t"), windows, LENGTH, 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a" * 20_000, "one token repeated"),
        (" " * 20_000, "one token repeated"),
        ("0123456789abcdef" * 2000, "all 16 windows of the calibration text are the same"),
    ],
)
def test_worthless_text_is_refused(tokenizer: PreTrainedTokenizerBase, text: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"--dataset t: .*{reason}; give text"):
        check_worth(cut(tokenizer, text), 0)


@pytest.mark.parametrize("windows", [1, 16])
def test_a_repeated_token_is_refused_beside_a_prefix(windows: int) -> None:
    text = TokenizedText(torch.full((2000,), 7, dtype=torch.int32), [1, 2], "t")
    with pytest.raises(InputError, match="one token repeated"):
        check_worth(cut_windows(text, windows, LENGTH, 0), 2)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("0,0,0\n" * 5000, [r"few different tokens \(3, ", r"repeats itself \(only 6 of \d+ sequences"]),
        ("".join(random.Random(0).choices("ACGT", k=20_000)), [r"few different tokens \(4, as varied as 4\.0"]),
        ("The river crosses the town beneath eleven bridges of stone.\n" * 400, ["repeats itself"]),
    ],
)
def test_text_of_little_worth_gives_warnings(tokenizer: PreTrainedTokenizerBase, text: str, reasons: list[str]) -> None:
    found = check_worth(cut(tokenizer, text), 0)
    assert len(found) == len(reasons)
    for line, reason in zip(found, reasons, strict=True):
        assert re.match(f"t .*{reason}.*give", line)


@pytest.mark.parametrize("windows", [1, 8, 128])
def test_prose_gives_no_warning(tokenizer: PreTrainedTokenizerBase, windows: int) -> None:
    assert check_worth(cut(tokenizer, "\n".join(builtin_prose())[:20_000], windows), 0) == []
