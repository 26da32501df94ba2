"""docs/options.md shows the options that the command line has."""

import argparse

import pytest

from pgsvd_vllm.cli import COMMANDS
from tests.cli_reference import DOCUMENT, parser_of, render, spelling


def test_the_option_tables_equal_the_parsers() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == render(document), "run: python tests/cli_reference.py --write"


def test_a_stale_or_missing_table_is_found() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    stale = document.replace("to REMOVE", "to keep")
    assert stale not in (document, render(stale))
    with pytest.raises(ValueError, match="has tables for"):
        render(document.replace("<!-- options of tune -->", ""))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "env"])
def test_every_option_has_a_help_text(command: str) -> None:
    assert all(action.help for action in parser_of(command)._actions if action.option_strings)


def test_options_are_spelled_as_on_the_command_line() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-r", "--refine", nargs="?", metavar="MINUTES")
    parser.add_argument("--form", choices=["pivot", "factors"])
    parser.add_argument("--ignore", nargs="+", metavar="PATTERN")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--sequential", action=argparse.BooleanOptionalAction)
    assert [spelling(action) for action in parser._actions] == [
        "`MODEL`",
        "`-r, --refine [MINUTES]`",
        "<code>--form pivot&#124;factors</code>",
        "`--ignore PATTERN ...`",
        "`--resume`",
        "`--sequential, --no-sequential`",
    ]
