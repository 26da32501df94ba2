"""Reads one row of a data set, in any common format, as a text or as a conversation."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
# A solution ends with the answer that stands beside it.
ANSWERS = ("output", "completion", "response", "solution", "answer", "chosen")
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")
# Names of roles in ShareGPT rows and elsewhere, and the roles of chat templates.
ROLES = {name: name for name in ("system", "user", "assistant", "tool", "developer", "function", "ipython")} | {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard", "function_call", "function-call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function-response", "tool_response"), "tool"),
}
TEXT_PARTS = ("text", "input_text", "output_text")


class RowError(ValueError):
    """A row cannot be used; the message says why, without its place."""


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Attributes:
        messages: each with `role` and `content`, both strings; other keys are for the chat template.
    """

    messages: list[Row]


Document = str | Conversation


def read_row(row: Any, column: str | None = None) -> Document:
    """The text or the conversation of a row; see `FORMATS`.

    A blank or empty field counts only if the row has nothing else: tables have every column in every row.

    Args:
        row: any JSON value; upper and lower case of its keys are alike, and null is the same as no value.
        column: the field that holds a text or a list of messages, whatever else the row has; None for `FORMATS`.

    Raises:
        RowError: the row has none of the formats, or one of its values has the wrong type.
    """
    if column is not None:
        return _of_column(row, column)
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise RowError(f"is {_kind(row)}, not an object; {TAKEN}")
    values: Row = {}
    for key, value in row.items():
        if value is not None:
            values.setdefault(str(key).strip().lower(), value)
    filled = {key: value for key, value in values.items() if not _is_blank(value)}
    for fields in (filled, values) if len(filled) < len(values) else (values,):
        for _, read in FORMATS:
            document = read(fields)
            if document is not None:
                return document
    for key, value in row.items():
        if str(key).strip().lower() in ("text", "content", "chosen"):
            raise RowError(f"has {json.dumps(str(key))} as {_kind(value)}, not a string; {TAKEN}")
    raise RowError(f"has {_names(row)}; {TAKEN}")


def _of_column(row: Any, column: str) -> Document:
    """The text or the conversation in one field of a row."""
    if not isinstance(row, dict):
        raise RowError(f"is {_kind(row)}, not an object with {json.dumps(column)}")
    if column not in row:
        raise RowError(f"has {_names(row)}, and no {json.dumps(column)} (`text_column`)")
    value = row[column]
    if isinstance(value, list):
        return _conversation(_messages(value), {})
    if value is None or isinstance(value, str):  # a table may have gaps
        return value or ""
    raise RowError(f"has {json.dumps(column)} as {_kind(value)}, not a string or a list of messages")


def _names(row: Row) -> str:
    """The first names of a row's fields, for an error."""
    return ", ".join(json.dumps(str(key)) for key in list(row)[:12]) or "no fields"


def known_fields(names: Iterable[str], column: str | None = None) -> list[str]:
    """The names of columns that `read_row` may read."""
    if column is not None:
        return [name for name in names if name == column]
    known = {"text", "content", *CHATS, *QUESTIONS, *ANSWERS, *INPUTS, *SYSTEMS, "role", "from"}
    return [name for name in names if name.strip().lower() in known]


def _text(row: Row) -> Document | None:
    """A plain text."""
    text = row.get("text")
    return text if isinstance(text, str) else None


def _chat(row: Row) -> Document | None:
    """A list of messages, as of OpenAI (`role`, `content`) or ShareGPT (`from`, `value`)."""
    name = _first(row, CHATS)
    if name is None:
        return None
    found = row[name]
    if isinstance(found, str):  # CSV files and some Parquet files hold lists as JSON
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise RowError(f'has "{name}" as a string that is not JSON') from None
    if not isinstance(found, list):
        raise RowError(f'has "{name}" as {_kind(found)}, not a list of messages')
    return _conversation(_messages(found), {} if name == "messages" else row)


def _pair(row: Row) -> Document | None:
    """A question and its answer, each a string or a list of messages."""
    asked, answered = _first(row, QUESTIONS), _first(row, ANSWERS)
    if asked is None or (answered is None and asked != "prompt"):
        return None
    question = _turns(asked, row[asked], "user")
    answer = [] if answered is None else _turns(answered, row[answered], "assistant")
    if answer and answer[0]["role"] in ("user", "system"):  # a chosen conversation repeats its prompt
        return _conversation(answer, row)
    more = next((row[name] for name in INPUTS if name != asked and isinstance(row.get(name), str)), "")
    if question and more.strip() and isinstance(row[asked], str):
        question[0]["content"] += f"\n{more}"
    if not question and answer:
        return "\n".join(turn["content"] for turn in answer)
    return _conversation(question + answer, row)


def _chosen(row: Row) -> Document | None:
    """The preferred one of two answers that include their prompts."""
    chosen = row.get("chosen")
    if chosen is None or isinstance(chosen, str):
        return chosen
    return _conversation(_turns("chosen", chosen, "assistant"), row)


def _content(row: Row) -> Document | None:
    """A plain text under its other name."""
    text = row.get("content")
    if isinstance(text, str) and ("role" in row or "from" in row):
        raise RowError('is a single message; put all messages of a conversation into one row, in a list "messages"')
    return text if isinstance(text, str) else None


# What a row may hold and the function that reads it, or returns None; the first that reads a row decides.
FORMATS: tuple[tuple[str, Callable[[Row], Document | None]], ...] = (
    ('"text"', _text),
    ('"messages"', _chat),
    ('"conversations"', _chat),
    ('"prompt" and "completion"', _pair),
    ('"instruction" and "output"', _pair),
    ('"question" and "answer"', _pair),
    ('"chosen"', _chosen),
    ('"content"', _content),
)
TAKEN = f"a row needs {', '.join(name for name, _ in FORMATS)} or the field that `text_column` names"


def _conversation(messages: list[Row], row: Row) -> Conversation:
    """A conversation that says something, opened by the row's system prompt."""
    if not any(message["content"].strip() for message in messages):
        raise RowError("has a conversation without any text")
    system = next((row[name] for name in SYSTEMS if isinstance(row.get(name), str)), "")
    if system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages)


def _turns(name: str, value: Any, role: str) -> list[Row]:
    """The messages of one side of a pair; an empty string is no message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f'has "{name}" as {_kind(value)}, not a string or a list of messages')
    return _messages(value)


def _messages(entries: list[Any]) -> list[Row]:
    """Messages of the shape that chat templates expect."""
    if not entries:
        raise RowError("has an empty conversation")
    return [_message(entry, f"message {number}") for number, entry in enumerate(entries, 1)]


def _message(entry: Any, where: str) -> Row:
    """One message; `where` names it in errors."""
    if not isinstance(entry, dict):
        raise RowError(f'{where} is {_kind(entry)}, not an object with "role" and "content"')
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if not isinstance(role, str) or not role.strip():
        raise RowError(f"{where} has {_kind(role)} as its role" if role is not None else f"{where} has no role")
    if "role" not in entry and role.lower() not in ROLES:
        raise RowError(f'{where} is "from" {json.dumps(role)}; known are {", ".join(ROLES)}')
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowError(f"{where} has {'no content' if content is None else f'{_kind(content)} as its content'}")
    return {**message, "role": ROLES.get(role.lower(), role), "content": content}


def _part(part: Any, where: str) -> str:
    """The text of a content part; vLLM joins such parts by line ends as well."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"{where} holds {_kind(part)} as a content part")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise RowError(
            f"{where} holds a content part of type {json.dumps(str(kind))}; a text data set takes text alone, images "
            "belong into a folder with captions.jsonl"
        )
    if not isinstance(part.get("text"), str):
        raise RowError(f'{where} holds a text part without "text"')
    return part["text"]


def _tool_calls(calls: Any, where: str) -> list[Row]:
    """Tool calls whose arguments are objects, which chat templates expect; OpenAI's rows hold them as JSON strings."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where} has a tool call without the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise RowError(f"{where} has a tool call whose arguments are not JSON") from None
        named = {**function, "arguments": {} if arguments is None else arguments}
        found.append({**call, "function": named} if "function" in call else named)
    return found


def _first(row: Row, names: Iterable[str]) -> str | None:
    """The first of some names that a row has."""
    return next((name for name in names if name in row), None)


def _is_blank(value: Any) -> bool:
    """Whether a field holds nothing: white space, or a list or an object without entries."""
    return not value.strip() if isinstance(value, str) else value in ([], {})


def _kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")
