"""The `pgsvd-vllm` command: one file per sub-command; a user's error prints one line and exits with status 2."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO, cast

import pgsvd_vllm
from pgsvd_vllm.cli import (
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
    tune,
    verify,
)
from pgsvd_vllm.cli.flags import refuse_empty, with_flags
from pgsvd_vllm.cli.output import Lines, Output, open_missing_streams
from pgsvd_vllm.cli.stop import Stop
from pgsvd_vllm.errors import PgsvdError, as_interruption

COMMANDS = {
    "compress": compress,
    "pareto": pareto,
    "evaluate": evaluate,
    "convert": convert,
    "dequantize": dequantize,
    "export": export,
    "profile": profile,
    "tune": tune,
    "inspect": inspect,
    "report": report,
    "verify": verify,
    "env": env,
}
INTERNAL_ERROR, USER_ERROR = 1, 2
# Between two states of a progress bar in a file or a pipe.
BAR_SECONDS = "30"


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="pgsvd-vllm",
        description="Compress Hugging Face models into low-rank factors and serve them with vLLM.",
        epilog="Serve the result with: vllm serve DIR --load-format pgsvd",
    )
    parser.add_argument("-V", "--version", action="version", version=f"pgsvd-vllm {pgsvd_vllm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first_line = (module.__doc__ or "").splitlines()[0]
        module.configure(commands.add_parser(name, help=first_line, description=first_line))
    return parser


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
    streams = sys.stdout, sys.stderr
    output = Output(sys.stdout)
    in_terminal = sys.stderr.isatty()
    if not in_terminal:
        os.environ.setdefault("TQDM_MININTERVAL", BAR_SECONDS)  # read when tqdm is imported
    errors = Output(sys.stderr, "\n\t\r") if in_terminal else Lines(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    stop = Stop(advice)
    try:
        status = _run(arguments, given, stop)
        stop.is_over = True
        output.flush()
        if output.is_incomplete:
            print(f"pgsvd-vllm: error: cannot write to standard output ({output.failure})", file=sys.stderr)
            status = status or USER_ERROR
        return status
    finally:
        stop.close()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def _run(arguments: argparse.Namespace, given: Sequence[str], stop: Stop) -> int:
    """Run the command of parsed arguments and print its error; returns the exit status."""
    try:
        with as_interruption():
            refuse_empty(given)
            return COMMANDS[arguments.command].run(arguments)
    except PgsvdError as error:
        print(f"pgsvd-vllm: error: {with_flags(' '.join(str(error).split()))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        print(f"pgsvd-vllm: interrupted; {error if error.args else stop.advice}", file=sys.stderr)
        return stop.status
    except Exception:  # a bug: print what a report needs
        traceback.print_exc()
        print("pgsvd-vllm: internal error; please report it with the output of: pgsvd-vllm env", file=sys.stderr)
        return INTERNAL_ERROR
