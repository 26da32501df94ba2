"""Translates option fields in messages into flags, and the command line into a form that can be published."""

import argparse
import re
import shlex
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from pgsvd_vllm.errors import InputError

_FIELD = re.compile(r"`([a-z][a-z_]*)`")
# An option of one letter with its value attached, such as -o/home/me/out.
_SHORT = re.compile(r"(-[a-zA-Z])(/.*)", re.DOTALL)


@cache
def _flags() -> dict[str, str]:
    """Field -> flag of every option of the commands whose code names fields."""
    from pgsvd_vllm.cli import compress, convert

    strings = []
    for command in (compress, convert):
        parser = argparse.ArgumentParser(add_help=False)
        command.configure(parser)
        strings += [string for action in parser._actions for string in action.option_strings if string[:2] == "--"]
    return {string.removeprefix("--").replace("-", "_"): string for string in strings}


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an argument without characters, often an unset shell variable; as a path it is the current folder.

    Args:
        arguments: of the program, without the program's name.

    Raises:
        InputError: names the option before the argument.
    """
    for before, argument in pairwise(arguments):
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if (equals or flag == before) and not value.strip():
            name = flag if flag.startswith("-") else "MODEL or DIR"
            raise InputError(f"{name}: is empty; give it a value")


def with_flags(text: str) -> str:
    """Replace option fields in backticks, such as `max_seq_length`, by their flags, such as --max-seq-length."""
    return _FIELD.sub(lambda found: _flags().get(found[1], found[0]), text)


def shareable_command(arguments: Sequence[str]) -> str:
    """The command line for a checkpoint's description; absolute paths are reduced to their last part or hub id.

    Args:
        arguments: of the program, without the program's name.
    """
    return shlex.join(["pgsvd-vllm", *map(_shareable, arguments)])


def _shareable(argument: str) -> str:
    from pgsvd_vllm.offline.model.hub import public_name

    attached = _SHORT.fullmatch(argument)
    if attached:
        return f"{attached[1]}{public_name(attached[2])}"
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{flag}{equals}{public_name(value)}" if Path(value).is_absolute() else argument
