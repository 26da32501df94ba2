"""Calibration text: the documents of every kind of data set."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.evaluation.perplexity import held_out_prose
from pgsvd_vllm.offline.data.text import builtin_prose, load_tokenizer, read_documents
from pgsvd_vllm.offline.data.tokens import tokenize
from pgsvd_vllm.offline.options import BUILTIN

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FIELDS = ["text", "content", "messages", "conversations", "role", "from", "value", "type", "prompt", "completion"]
# What templates of vision-language models do: they take content parts and drop strings.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_builtin_prose_is_long_english_text(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = list(read_documents(BUILTIN, 0, tokenizer))
    assert documents == list(builtin_prose())
    text = "\n".join(documents)
    assert len(text) > 400_000
    assert text.count(" the ") > 3000
    ids = tokenize(tokenizer, documents, "t").ids
    assert ids.dtype == torch.int32
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
    assert list(read_documents(str(jsonl), 0, tokenizer)) == rows
    for name in ("data.txt", "data.md", "data", "DATA.TXT", "data.json.bak"):
        path = tmp_path / name
        path.write_text("plain\ntext ü", encoding="utf-8")
        assert list(read_documents(str(path), 0, tokenizer)) == ["plain\ntext ü"]


def test_bad_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            list(read_documents(str(path), 0, tokenizer))
        assert str(path) in str(caught.value)

    refused("latin.txt", b"caf\xe9", "not UTF-8")
    refused("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON")
    refused("deep.jsonl", b"[" * 100_000, "line 1 is not JSON")
    refused("none.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', 'line 3: has "body"; a row needs "text", "messages"')
    refused("number.jsonl", b'{"text": 3}', 'line 1: has "text" as a number, not a string; a row needs')
    refused("list.jsonl", b'["text"]', 'line 1: is a list, not an object; a row needs "text", "messages"')
    ignorable = "\xad \u202e\u202c \u3164 \ufe0f \uffff \U000e0041 \u2066"
    for content in (b"", b" \n\t " * 9000, "\u200b\ufeff\n".encode(), ignorable.encode(), b"\x01" + b" " * 20):
        refused("blank.txt", content, "holds no text, only white space")
    refused("binary.txt", b"\x01\x02\x03", "holds NUL bytes or control characters")
    refused("blank.jsonl", b'{"text": " "}\n{"text": "\\u0000"}', "holds no text, only white space")
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    for name in (str(tmp_path / "absent.txt"), "data/absent.jsonl", "", empty, "wikitext-3", "x" * 300):
        with pytest.raises(InputError, match=f"--dataset {name}: no such file.*python-docs"):
            list(read_documents(name, 0, tokenizer))
    with pytest.raises(InputError, match="no such file"):
        list(read_documents("a\0b", 0, tokenizer))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is no file or folder, but a pipe or a device"):
        list(read_documents(str(tmp_path / "pipe"), 0, tokenizer))


def test_the_field_of_the_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one", "text": "other"}\n{"body": "two"}\n', encoding="utf-8")
    assert list(read_documents(str(path), 0, tokenizer, column="body")) == ["one", "two"]
    with pytest.raises(InputError, match=r'rows.jsonl: line 2: has "body", and no "text" \(`text_column`\)'):
        list(read_documents(str(path), 0, tokenizer, column="text"))


def test_an_unavailable_hub_set_names_the_builtin_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"--dataset wikitext2: .*give a text file.*or python-docs \(offline\)"):
        list(read_documents("wikitext2", 100, tokenizer))


def test_messages_are_formatted_by_the_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "plain"}), encoding="utf-8")
    own = load_tokenizer(tiny_model)
    assert list(read_documents(str(path), 0, own)) == ["Hi\nYes?", "plain"]
    own.chat_template = CHATML
    assert list(read_documents(str(path), 0, own)) == ["<user>Hi<assistant>Yes?", "plain"]
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1: the model's chat template rejected it \(roles must alternate\)"):
        list(read_documents(str(path), 0, own))
    own.chat_template = PARTS
    assert list(read_documents(str(path), 0, own)) == ["<user>Hi<assistant>Yes?", "plain"]
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    with pytest.raises(
        InputError, match=r"line 1: the model's chat template rejected it \(it leaves the text .* out\)"
    ):
        list(read_documents(str(path), 0, own))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_is_formatted_as_conversations(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One\nline.\n\n Two. \n \nThree.\n", encoding="utf-8")
    own = load_tokenizer(tiny_model)
    with pytest.raises(InputError, match=r"--chat-template: the model's tokenizer has no chat template"):
        list(read_documents(str(path), 10, own, chat=True))
    own.chat_template = CHATML
    assert list(read_documents(str(path), 10, own, chat=True)) == ["<user>One\nline.<assistant>Two.", "<user>Three."]
    assert next(read_documents(BUILTIN, 10, own, chat=True)).startswith("<user>")
    rows = path.with_suffix(".jsonl")
    messages = [{"role": "user", "content": "Hi"}]
    rows.write_text(json.dumps({"text": "a\n\nb"}) + "\n" + json.dumps({"messages": messages}), encoding="utf-8")
    assert list(read_documents(str(rows), 10, own, chat=True)) == ["<user>a<assistant>b", "<user>Hi"]
    own.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match=r"the template rejected a user/assistant turn \(no system\)"):
        list(read_documents(str(path), 10, own, chat=True))


def test_conversations_use_the_template_of_a_real_model(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    document = next(read_documents(BUILTIN, 10, tokenizer, chat=True))
    assert document.count("<|im_start|>assistant\n") == 1
    assert document.count("<|im_start|>user\n") == 1


def test_instruction_rows_use_the_template_or_are_joined(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        {"instruction": "Q", "input": "x", "output": "A"},
        {"prompt": "The sky is", "completion": " blue."},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"question": "", "answer": "A"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    own = load_tokenizer(tiny_model)
    assert list(read_documents(str(path), 0, own)) == ["Q\nx\nA", "The sky is blue.", "Q\nA", "A"]
    own.chat_template = CHATML
    wanted = ["<user>Q\nx<assistant>A", "<user>The sky is<assistant> blue.", "<user>Q<assistant>A", "A"]
    assert list(read_documents(str(path), 0, own)) == wanted


def test_lone_surrogates_become_replacement_characters(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud800 b \\udc00 c"}\n{"text": "\\ud83d\\ude00"}', encoding="ascii")
    documents = list(read_documents(str(path), 0, tokenizer))
    assert documents == ["a \ufffd b \ufffd c", "\U0001f600"]
    assert len(tokenize(tokenizer, documents, "t").ids) == sum(len(d.encode()) for d in documents) + 2


def test_a_folder_gives_the_files_of_one_format(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def documents() -> list[str]:
        return list(read_documents(str(tmp_path), 0, tokenizer))

    write("README.md", "about")
    write("notes/b.TXT", "b")
    write("notes/trains.txt", "trains")
    write(".hidden.txt", "hidden")
    write("a.txt", "a")
    assert documents() == ["a", "b", "trains"]
    write("dataset_info.json", "{}")
    write("data/1.jsonl", '{"text": "1"}')
    write("data/0.jsonl", '{"text": "0"}')
    assert documents() == ["0", "1"]
    write("data/train-00000.jsonl", '{"text": "train"}')
    assert documents() == ["train"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    row=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
        max_leaves=10,
    )
)
def test_any_row_of_a_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerBase, row: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row), encoding="utf-8")
    refused = ""
    try:
        documents = read_documents(str(path), 0, chat_tokenizer)
        assert len(tokenize(chat_tokenizer, documents, "t").ids) >= 2
    except InputError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"--dataset {path}: line 2: ")
        assert "\n" not in refused
