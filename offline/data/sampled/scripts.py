"""What each sampled window consists of: documents of free text, or conversations in the model's chat template.

All windows of a batch grow by one token at a time. A script returns the next token of its window: the one that the
model has just drawn, or one that the form requires, such as the start of a new document or the tokens between two turns
of a conversation. So no window is padded, and every token of it is worth calibrating on.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pgsvd_vllm.offline.data.chat import DATE
from pgsvd_vllm.offline.data.tokens import leading_tokens

# Longest turns and documents, in tokens; the form then goes on as if the model had ended them. Chat models hardly end
# free text, and drift.
LONGEST_USER, LONGEST_ASSISTANT, LONGEST_DOCUMENT = 200, 500, 200
# Texts that no template contains, to find the places of the messages.
MARKS = ("XQZA1", "XQZB2", "XQZC3")


@dataclass(frozen=True)
class Form:
    """The special tokens of a model's text.

    Attributes:
        leading: put before any text, such as BOS.
        separator: end-of-text token between documents; empty if there is none.
        special: all tokens that are no text.
        plain: all tokens that are text, to begin documents with.
        turns: of a conversation; None without a usable chat template.
    """

    leading: list[int]
    separator: list[int]
    special: frozenset[int]
    plain: list[int]
    turns: "Turns | None"


@dataclass(frozen=True)
class Turns:
    """The tokens around the messages of a conversation.

    Attributes:
        opening: before the first user message, such as a system prompt.
        to_assistant: between a user message and its answer.
        to_user: between an answer and the next user message. Both begin with a special token, which ends a message.
    """

    opening: list[int]
    to_assistant: list[int]
    to_user: list[int]


class Script(ABC):
    """The form of one window.

    Args:
        form: of the model.
        chance: of the window; its tokens are drawn with it as well.
        opening: the tokens that the window begins with.
    """

    def __init__(self, form: Form, chance: random.Random, opening: list[int]) -> None:
        self._form, self.chance = form, chance
        self._queue, self._length = opening, 0

    def next(self, drawn: int) -> int:
        """The next token of the window, given the model's draw; the first call ignores it.

        A special token, or too many tokens, end the document or message and begin the next one.
        """
        if not self._queue:
            self._length += 1
            if drawn in self._form.special or self._length > self._longest:
                self._queue, self._length = self._between(), 0
        return self._queue.pop(0) if self._queue else drawn

    @property
    @abstractmethod
    def _longest(self) -> int:
        """Tokens of the current document or message at most."""

    @abstractmethod
    def _between(self) -> list[int]:
        """The tokens before the next document or message."""


class FreeText(Script):
    """Documents, each of which begins with a random token."""

    _longest = LONGEST_DOCUMENT

    def __init__(self, form: Form, chance: random.Random) -> None:
        super().__init__(form, chance, _beginning(form, chance))

    def _between(self) -> list[int]:
        return [*self._form.separator, *_beginning(self._form, self.chance)]


def _beginning(form: Form, chance: random.Random) -> list[int]:
    """The tokens that begin a document."""
    return [*form.leading, chance.choice(form.plain)]


class Chat(Script):
    """Conversations of one or more turns, the user's messages sampled as well; `form` has turns."""

    def __init__(self, form: Form, chance: random.Random) -> None:
        assert form.turns is not None
        super().__init__(form, chance, list(form.turns.opening))
        self._turns, self._by_user = form.turns, True

    @property
    def _longest(self) -> int:
        return LONGEST_USER if self._by_user else LONGEST_ASSISTANT

    def _between(self) -> list[int]:
        """The tokens before the next message; after an answer half of the conversations end."""
        turns = self._turns
        self._by_user = not self._by_user
        if not self._by_user:
            return list(turns.to_assistant)
        if self.chance.random() < 0.5:
            return list(turns.to_user)
        # The end of the answer is what stands before the next message and is no part of the opening.
        return [*turns.to_user[:1], *turns.opening]


def read_form(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Form:
    """The special tokens of a model's text, and its turns.

    Args:
        tokenizer: of the model.
        ends: end-of-text tokens of the generation configuration.
    """
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *ends, *(index for index, token in added.items() if token.special)}
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    plain = [index for index in range(len(tokenizer)) if index not in special]
    return Form(leading_tokens(tokenizer), separator, frozenset(special), plain, _read_turns(tokenizer, special))


def _read_turns(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> Turns | None:
    """The turns of a chat template; None without one that marks the end of a turn by a special token."""
    if not tokenizer.chat_template:
        return None
    roles = zip(("user", "assistant", "user"), MARKS, strict=True)
    messages = [{"role": role, "content": mark} for role, mark in roles]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=DATE.strftime))
        opening, rest = text.split(MARKS[0])
        to_assistant, rest = rest.split(MARKS[1])
        to_user, _ = rest.split(MARKS[2])
    except Exception:  # templates raise exceptions of many types, and may leave messages out
        return None
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (opening, to_assistant, to_user)]
    turns = Turns(*parts)
    ended = all(part and part[0] in special for part in (turns.to_assistant, turns.to_user))
    return turns if ended and turns.opening else None
