"""The `pgsvd-vllm` command: one file per sub-command; a user's error prints one line and exits with status 2."""

import argparse
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TextIO, cast

import pgsvd_vllm
from pgsvd_vllm.cli import (
    completion,
    compress,
    convert,
    dequantize,
    env,
    evaluate,
    export,
    inspect,
    pareto,
    profile,
    report,
    study,
    tune,
    verify,
)
from pgsvd_vllm.cli.flags import refuse_empty, with_flags
from pgsvd_vllm.cli.log import add_log, output_streams, settings_restored
from pgsvd_vllm.cli.output import open_missing_streams
from pgsvd_vllm.cli.recipe import with_recipe
from pgsvd_vllm.cli.stop import Stop
from pgsvd_vllm.errors import PgsvdError, as_interruption

# Task -> its commands.
GROUPS: dict[str, dict[str, ModuleType]] = {
    "compress": {"compress": compress, "pareto": pareto, "study": study},
    "judge": {"evaluate": evaluate, "report": report, "inspect": inspect, "verify": verify},
    "convert": {"convert": convert, "export": export, "dequantize": dequantize},
    "speed and support": {"profile": profile, "tune": tune, "env": env, "completion": completion},
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}
# Commands that take minutes or hours.
LOGGED = (*GROUPS["compress"], *GROUPS["convert"], "evaluate")
INTERNAL_ERROR, USER_ERROR = 1, 2
# Columns of descriptions.
WIDTH = 96


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="pgsvd-vllm",
        description="Compress Hugging Face models into low-rank factors and serve them with vLLM.",
        epilog="\n".join([*_listed(), "", "Serve the result with: vllm serve DIR --load-format pgsvd"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [-V] COMMAND ...",
    )
    parser.add_argument("-V", "--version", action="version", version=f"pgsvd-vllm {pgsvd_vllm.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS
    )
    for name, module in COMMANDS.items():
        paragraphs = (module.__doc__ or "").strip().split("\n\n")
        examples = "".join(f"\n  pgsvd-vllm {line}" for line in module.EXAMPLES)
        command = commands.add_parser(
            name,
            help=_summary(module),  # for shell completion; the list by tasks is below
            description="\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs),
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(command)
        if name in LOGGED:
            add_log(command)
    return parser


def _summary(module: ModuleType) -> str:
    """The first line of a command's description."""
    return (module.__doc__ or "").partition("\n")[0]


def _listed() -> Iterator[str]:
    """The lines that list the commands by task."""
    for title, group in GROUPS.items():
        yield f"{title}:"
        for name, module in group.items():
            yield from textwrap.wrap(
                _summary(module), WIDTH, initial_indent=f"  {name:10}  ", subsequent_indent=" " * 14
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of this process.

    Returns:
        The exit status: 0, 1 for an internal error or a wrong result, 2 for a user's error, 3 where `evaluate` finds
        less quality than required, 128 + n after signal n.
    """
    open_missing_streams()
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(given)
    advice = "repeat with --resume" if hasattr(arguments, "resume") else "repeat the command"
    with settings_restored():
        return _with_streams(arguments, given, advice)


def _with_streams(arguments: argparse.Namespace, given: Sequence[str], advice: str) -> int:
    """Run the command with the output that its options ask for; returns the exit status."""
    streams = sys.stdout, sys.stderr
    output, errors = output_streams(arguments)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    stop = Stop(advice)
    try:
        status = _run(arguments, given, stop)
        stop.is_over = True
        output.end()
        output.flush()
        if output.is_incomplete:
            print(f"pgsvd-vllm: error: cannot write to standard output ({output.failure})", file=sys.stderr)
            status = status or USER_ERROR
        return status
    finally:
        stop.close()
        errors.end()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def _run(arguments: argparse.Namespace, given: Sequence[str], stop: Stop) -> int:
    """Run the command of parsed arguments and print its error; returns the exit status."""
    recipe = getattr(arguments, "recipe", None)
    try:
        with as_interruption():
            refuse_empty(given)
            if recipe is not None:
                name, *others = given
                arguments = build_parser().parse_args([name, *with_recipe(others, recipe)])
            return COMMANDS[arguments.command].run(arguments)
    except PgsvdError as error:
        text = with_flags(" ".join(str(error).split()))
        among = "" if recipe is None or "--recipe" in text else f" (with the options of --recipe {recipe})"
        print(f"pgsvd-vllm: error: {text}{among}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        print(f"pgsvd-vllm: interrupted; {error if error.args else stop.advice}", file=sys.stderr)
        return stop.status
    except Exception:  # a bug: print what a report needs
        traceback.print_exc()
        print("pgsvd-vllm: internal error; please report it with the output of: pgsvd-vllm env", file=sys.stderr)
        return INTERNAL_ERROR
