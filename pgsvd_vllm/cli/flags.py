"""Translates option fields in messages into flags, and the command line into a form that can be published."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_FIELD = re.compile(r"`([a-z][a-z_]*)`")


def with_flags(text: str) -> str:
    """Replace option fields in backticks, such as `max_seq_length`, by their flags, such as --max-seq-length."""
    return _FIELD.sub(lambda found: f"--{found[1].replace('_', '-')}", text)


def shareable_command(arguments: Sequence[str]) -> str:
    """The command line for a checkpoint's description; absolute paths are reduced to their last part.

    Args:
        arguments: of the program, without the program's name.
    """
    return shlex.join(["pgsvd-vllm", *map(_shareable, arguments)])


def _shareable(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value)
    return f"{flag}{equals}{path.name}" if path.is_absolute() else argument
