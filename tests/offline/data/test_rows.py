"""Rows of data sets: every common format, and anything else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgsvd_vllm.offline.data.rows import ANSWERS, CHATS, QUESTIONS, Conversation, RowError, read_row

ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
QA = [ASKED, ANSWERED]


def chat(*messages: dict[str, Any]) -> Conversation:
    return Conversation(list(messages))


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "plain"}, "plain"),
        ({"text": ""}, ""),
        ({"Text": "plain", "id": 3}, "plain"),
        ("plain", "plain"),
        ({"content": "code", "path": "a.py"}, "code"),
        ({"text": "plain", "messages": QA}, "plain"),
        ({"text": None, "messages": QA}, chat(*QA)),
        ({"messages": QA, "prompt": "Q", "prompt_id": "0"}, chat(*QA)),
        ({"messages": json.dumps(QA)}, chat(*QA)),
        ({"messages": [{**ASKED, "weight": 1, "name": None}, ANSWERED]}, chat({**ASKED, "weight": 1}, ANSWERED)),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, chat(*QA)),
        ({"conversations": [{"from": "Human", "value": "Q"}], "system": "S"}, chat(SYSTEM, ASKED)),
        ({"conversations": [SYSTEM, ASKED], "system": "other"}, chat(SYSTEM, ASKED)),
        ({"conversation": QA}, chat(*QA)),
        ({"prompt": "Q", "completion": "A"}, chat(*QA)),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, chat(*QA)),
        ({"prompt": "Q"}, chat(ASKED)),
        ({"prompt": [ASKED]}, chat(ASKED)),
        ({"prompt": "Q", "response": "A"}, chat(*QA)),
        ({"Question": "Q", "Answer": "A"}, chat(*QA)),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, chat(SYSTEM, *QA)),
        ({"instruction": "Q", "output": "A"}, chat(*QA)),
        ({"instruction": "Q", "input": "", "output": "A"}, chat(*QA)),
        ({"instruction": "Q", "input": "x", "output": "A"}, chat({"role": "user", "content": "Q\nx"}, ANSWERED)),
        ({"instruction": "Q", "context": "x", "response": "A"}, chat({"role": "user", "content": "Q\nx"}, ANSWERED)),
        ({"instruction": "Q", "output": ""}, chat(ASKED)),
        ({"instruction": "", "output": "A"}, "A"),
        ({"input": "Q", "output": "A"}, chat(*QA)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, chat(*QA)),
        ({"prompt": "Q", "chosen": QA, "rejected": []}, chat(*QA)),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED]}, chat(*QA)),
        ({"prompt": [ASKED], "chosen": ANSWERED, "rejected": ANSWERED}, chat(*QA)),
        ({"chosen": QA, "rejected": QA}, chat(*QA)),
        ({"chosen": "both sides", "rejected": "others"}, "both sides"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            chat({"role": "user", "content": "a\nb"}),
        ),
        (
            {
                "messages": [
                    ASKED,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "content": "3"},
                ]
            },
            chat(
                ASKED,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "content": ""},
                {"role": "tool", "content": "3"},
            ),
        ),
    ],
)
def test_common_formats_are_read(row: Any, document: Any) -> None:
    assert read_row(row) == document


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "", "messages": [ASKED]}, chat(ASKED)),
        ({"messages": [], "text": "a"}, "a"),
        ({"conversations": [], "prompt": "Q", "completion": "A"}, chat(ASKED, ANSWERED)),
        ({"instruction": " ", "input": "Q", "output": "A"}, chat(ASKED, ANSWERED)),
        ({"prompt": "", "question": "Q", "completion": "", "answer": "A"}, chat(ASKED, ANSWERED)),
        ({"text": "", "content": " "}, ""),
    ],
)
def test_blank_fields_give_way_to_filled_ones(row: Any, document: Any) -> None:
    assert read_row(row) == document


def test_a_named_field_is_read_alone() -> None:
    row = {"body": "b", "text": "t", "turns": [ASKED, ANSWERED], "gap": None, "number": 3}
    assert read_row(row, "body") == "b"
    assert read_row(row, "turns") == chat(ASKED, ANSWERED)
    assert read_row(row, "gap") == ""
    with pytest.raises(RowError, match='has "number" as a number, not a string or a list of messages'):
        read_row(row, "number")
    with pytest.raises(RowError, match=r'has "body", "text", .*, and no "Body" \(`text_column`\)'):
        read_row(row, "Body")
    with pytest.raises(RowError, match='is a list, not an object with "body"'):
        read_row(["b"], "body")


def test_a_whole_solution_is_preferred_to_its_answer() -> None:
    assert read_row({"problem": "Q", "answer": "3", "solution": "A"}) == chat(ASKED, ANSWERED)


def messages(*found: Any) -> dict[str, Any]:
    return {"messages": list(found)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (7, "is a number, not an object"),
        (None, "is null, not an object"),
        (["text"], "is a list, not an object"),
        ({}, "has no fields; a row needs"),
        ({"text": 3}, 'has "text" as a number, not a string; a row needs "text", "messages"'),
        ({"text": None}, 'has "text" as null, not a string; a row needs'),
        ({"Text": b"a", "id": 1}, 'has "Text" as bytes, not a string; a row needs'),
        ({"content": [1]}, 'has "content" as a list, not a string'),
        ({"body": "b"}, 'has "body"; a row needs'),
        ({"instruction": "Q", "output": None}, 'has "instruction", "output"; a row needs'),
        (messages(), "empty conversation"),
        ({"messages": {"role": "user"}}, '"messages" as an object, not a list'),
        ({"messages": "Q"}, '"messages" as a string that is not JSON'),
        (messages("Q", "A"), "message 1 is a string, not an object"),
        (messages(ASKED, ["A"]), "message 2 is a list, not an object"),
        (messages({"role": "user"}), "message 1 has no content"),
        (messages({"role": "user", "content": None}), "message 1 has no content"),
        (messages({"role": "user", "content": 3}), "message 1 has a number as its content"),
        (messages({"role": "user", "content": {"text": "a"}}), "message 1 has an object as its content"),
        (messages({"role": "user", "content": [["a"]]}), "message 1 holds a list as a content part"),
        (messages({"role": "user", "content": [{"type": "text"}]}), 'message 1 holds a text part without "text"'),
        (
            messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
            'type "image_url"; a text data set takes text alone',
        ),
        (messages({"role": "user", "content": []}), "without any text"),
        (messages({"role": "user", "content": " \n"}), "without any text"),
        (messages({"role": 1, "content": "Q"}), "message 1 has a number as its role"),
        (messages({"role": " ", "content": "Q"}), "message 1 has a string as its role"),
        (messages({"content": "Q"}), "message 1 has no role"),
        ({"conversations": [{"from": "Alice", "value": "Q"}]}, 'message 1 is "from" "Alice"; known are'),
        ({"conversations": [{"from": "human"}]}, "message 1 has no content"),
        (messages({"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}), "without the name of a function"),
        (
            messages({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "arguments are not JSON",
        ),
        ({"prompt": 3, "completion": "A"}, '"prompt" as a number'),
        ({"prompt": "Q", "completion": {"text": "A"}}, "message 1 has no role"),
        ({"question": "Q", "answer": [1]}, "message 1 is a number"),
        ({"prompt": "", "completion": ""}, "without any text"),
        ({"role": "user", "content": "Q"}, "is a single message"),
    ],
)
def test_other_rows_are_refused(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read_row(row)
    assert reason in str(caught.value)


KEYS = ["text", "content", "role", "from", "value", "type", "tool_calls", "function", "name", "arguments", "system"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "human", "tool", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*KEYS, *CHATS, *QUESTIONS, *ANSWERS]) | st.text(), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    row=JSON | st.dictionaries(st.sampled_from([*CHATS, *QUESTIONS, *ANSWERS, "text"]), JSON, min_size=1, max_size=4)
)
def test_any_json_value_is_read_or_refused(row: Any) -> None:
    refused = ""
    try:
        document = read_row(row)
    except RowError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        return
    if isinstance(document, str):
        return
    assert any(message["content"].strip() for message in document.messages)
    for message in document.messages:
        assert isinstance(message["role"], str)
        assert message["role"].strip()
        assert isinstance(message["content"], str)
        for call in message.get("tool_calls", []):
            assert isinstance(call.get("function", call)["name"], str)
