"""Writes the option tables of docs/options.md from the command line's own parsers.

    python tests/cli_reference.py            # prints the document
    python tests/cli_reference.py --write    # replaces the tables in it

A table stands between a line `<!-- options of NAME -->` and a line `<!-- end of options -->`. The prose around the
tables is written by hand and stays as it is.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pgsvd_vllm.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "options.md"

BLOCK = re.compile(r"(<!-- options of ([\w-]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one sub-command."""
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def code(text: str) -> str:
    """Text in the font of code, in a cell of a table, which a bar would end; a backslash is no escape inside code."""
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def spelling(action: argparse.Action) -> str:
    """An option as it is typed: its names, and its value or choices."""
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    else:
        value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return code(value)
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return code(names)
    value = {"?": f"[{value}]", "+": f"{value} ..."}.get(str(action.nargs), value)
    return code(f"{names} {value}")


def table(command: str) -> Iterator[str]:
    """The lines of a command's table: an option each, in the order of `--help`."""
    yield "| option | |"
    yield "|---|---|"
    for action in parser_of(command)._actions:
        if not isinstance(action, argparse._HelpAction):
            # A bar would end the cell, and a star begin emphasis.
            shown = re.sub(r"([|*])", r"\\\1", (action.help or "").replace("%%", "%"))
            yield f"| {spelling(action)} | {shown} |"


def render(document: str) -> str:
    """The document with every table made anew.

    Raises:
        ValueError: the document does not have exactly one table for every command that has options.
    """
    wanted = sorted(name for name in COMMANDS if len(parser_of(name)._actions) > 1)
    found = sorted(match[2] for match in BLOCK.finditer(document))
    if found != wanted:
        raise ValueError(f"{DOCUMENT.name} has tables for {found}, the command line has {wanted}")
    return BLOCK.sub(lambda block: block[1] + "\n".join(table(block[2])) + "\n" + block[3], document)


def main() -> int:
    """Print or write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/options.md")
    text = render(DOCUMENT.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        DOCUMENT.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
