"""Every command line that README.md and docs/ show is one that the programs take."""

import re
from pathlib import Path

import pytest
import tomllib

from pgsvd_vllm.cli import COMMANDS
from tests.cli_reference import parser_of
from tests.conftest import ROOT
from tests.docs.pages import PAGES, arguments_of, blocks, check_command, lines_of

SHOWN = [(page, line) for page in PAGES for line in lines_of("pgsvd-vllm", page.read_text(encoding="utf-8"))]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=[f"{named(page)}: {line}" for page, line in SHOWN])
def test_a_shown_command_is_valid(page: Path, line: str) -> None:
    check_command(line)


def test_the_pages_show_every_command() -> None:
    assert {check_command(line) for _, line in SHOWN} >= set(COMMANDS) - {"env", "completion"}


@pytest.mark.parametrize(
    "line", ["pgsvd-vllm compress M -o D --rati 0.2", "pgsvd-vllm compress M", "pgsvd-vllm shrink M"]
)
def test_a_wrong_command_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check_command(line)


def test_blocks_and_operators_are_understood() -> None:
    page = "# A\n\ntext\n\n    one a\n\n    two # c\n\n## B\n\n```bash\nthree \\\n    > log\n```\n"
    assert [(block.heading, block.language) for block in blocks(page)] == [("A", ""), ("B", "bash")]
    assert list(lines_of("one", page)) == ["one a"]
    assert arguments_of("two # c") == []
    assert arguments_of("""three 'a > b' --x={"y": 1} > log 2>&1 &""") == ["a > b", "--x={y:", "1}"]


def test_commands_in_running_text_name_options_that_exist() -> None:
    """Their values may be placeholders, such as N for a number."""
    wrong, count = [], 0
    for page in PAGES:
        for span in re.findall(r"(?<!`)`pgsvd-vllm\s([^`]+)`", page.read_text(encoding="utf-8")):
            name, *words = span.split()
            count += 1
            known = parser_of(name)._option_string_actions if name in COMMANDS else {}
            options = [word for word in words if word.startswith("-") and word.partition("=")[0] not in known]
            if name not in COMMANDS or options:
                wrong.append(f"{named(page)}: {span}")
    assert count >= 8
    assert wrong == []


def test_vllm_takes_every_shown_serve_command() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    shown = [arguments_of(line) for page in PAGES for line in lines_of("vllm serve", page.read_text(encoding="utf-8"))]
    assert len(shown) > 5
    for arguments in shown:
        # The port of a variable of the shell is a number there.
        parser.parse_args(["8000" if word == "$PORT" else word for word in arguments[1:]])


def test_installed_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"""pip install ["'](?:pgsvd-vllm|\.)\[([\w,]+)\]["']""", text)
    assert len(found) > 3
    assert {name for names in found for name in names.split(",")} <= set(extras)


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    shown = {
        line.split()[1]
        for page in pages
        for line in lines_of("make", page.read_text(encoding="utf-8"))
        if line.split()[1:]
    }
    assert {"venv", "demo", "test"} <= shown <= targets
