"""Renders conversations with the model's chat template, or joins them where the model has none."""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.data.rows import Conversation, RowError

# For chat templates that write the current date.
DATE = datetime(2026, 1, 1)


def conversations(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Format documents as conversations: each pair of paragraphs is one user and one assistant turn.

    Args:
        documents: plain texts; blank lines separate paragraphs.
        tokenizer: with the model's chat template.

    Raises:
        InputError: the model has no chat template, or the template rejects a user and an assistant turn.
    """
    if not tokenizer.chat_template:
        raise InputError("--chat-template: the model's tokenizer has no chat template; omit it")
    for document in documents:
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", document) if part.strip()]
        for number in range(0, len(paragraphs), 2):
            roles = zip(("user", "assistant"), paragraphs[number : number + 2], strict=False)
            messages = [{"role": role, "content": content} for role, content in roles]
            try:
                yield _apply_template(messages, tokenizer)
            except Exception as error:  # templates raise exceptions of many types
                reason = reason_of(error)
                raise InputError(f"--chat-template: the template rejected a user/assistant turn ({reason})") from None


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the model's chat template; its texts alone where the model has no template.

    Texts are joined by a line end where neither side of the joint is white space, so that a prompt and its completion
    continue each other.

    Raises:
        RowError: the template rejects the conversation, or leaves its text out.
    """
    if not tokenizer.chat_template:
        joined = ""
        for content in (message["content"] for message in conversation.messages):
            open_end = joined and content and not joined[-1].isspace() and not content[0].isspace()
            joined += "\n" + content if open_end else content
        return joined
    try:
        return _apply_template(conversation.messages, tokenizer)
    except Exception as error:  # templates raise exceptions of many types
        raise RowError(f"the model's chat template rejected it ({reason_of(error)})") from None


def _apply_template(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """One conversation in the model's chat template; a fixed date keeps the text the same on every day.

    Templates of vision-language models take content parts alone, and drop a string without a word.
    """
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for form in (messages, parts):
        text = str(tokenizer.apply_chat_template(form, tokenize=False, strftime_now=DATE.strftime))
        if any(message["content"].strip() and message["content"].strip() in text for message in messages):
            return text
    raise RowError("it leaves the text of the messages out")
