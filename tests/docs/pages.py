"""The pages of README.md and docs/: their blocks of code, and the command lines in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgsvd_vllm.cli import build_parser
from tests.cli_reference import parser_of
from tests.conftest import ROOT

# docs/dev/log.md is history: its commands were those of their day.
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "log.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|(?<=\n\n))(?: {4}.*\n)(?:(?: {4}.*)?\n)*", re.MULTILINE)
# What ends a command in a shell.
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        heading: of its section, or "".
        language: of a fence, such as bash; "" without one.
        code: without the fence or the indent.
    """

    heading: str
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """The blocks of code of a page in Markdown, fenced and indented, in their order."""
    found = [(match.start(), match[1], match[2]) for match in FENCE.finditer(text)]
    # Without the fences, whose code may be indented as well.
    plain = FENCE.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)
    found += [
        (match.start(), "", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)) for match in INDENTED.finditer(plain)
    ]
    headings = [(match.start(), match[1]) for match in re.finditer(r"^#+ (.*)$", plain, re.MULTILINE)]

    def heading(position: int) -> str:
        return next((title for start, title in reversed(headings) if start < position), "")

    return [Block(heading(start), language, code) for start, language, code in sorted(found)]


def lines_of(program: str, text: str) -> Iterator[str]:
    """The command lines of a program in the blocks of a page; a backslash joins lines."""
    for block in blocks(text):
        for line in block.code.replace("\\\n", " ").splitlines():
            if line.startswith(f"{program} "):
                yield line


def arguments_of(line: str) -> list[str]:
    """The words of a command line behind its program, up to a comment or an operator of the shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in OPERATORS:
            break
        words.append(word)
    # `2>` leaves its number.
    return words[1:]


def check_command(line: str) -> str:
    """Parse a command line of pgsvd-vllm as the program does, all options spelled in full; returns the command's name.

    Raises:
        SystemExit: the parser refuses it.
        AssertionError: it is another program's, or abbreviates an option.
    """
    assert shlex.split(line, comments=True)[0] == "pgsvd-vllm"
    arguments = arguments_of(line)
    command: str = build_parser().parse_args(arguments).command
    known = parser_of(command)._option_string_actions
    assert [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known] == []
    return command


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs.yml makes them."""
    from pymdownx.slugs import slugify

    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    slug = slugify(case="lower")
    # A heading's own marks, such as those of code, are not part of its anchor.
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {slug(re.sub(r"[`*]", "", title), "-") for title in titles}
