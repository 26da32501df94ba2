"""The `pgsvd-vllm` command: one file per sub-command; a user's error prints one line and exits with status 2."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import pgsvd_vllm
from pgsvd_vllm.cli import compress, env, inspect, profile, tune, verify
from pgsvd_vllm.cli.flags import with_flags
from pgsvd_vllm.errors import PgsvdError

COMMANDS = {"compress": compress, "profile": profile, "tune": tune, "inspect": inspect, "verify": verify, "env": env}
INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="pgsvd-vllm",
        description="Compress Hugging Face models into low-rank factors and serve them with vLLM.",
        epilog="Serve the result with: vllm serve DIR --load-format pgsvd",
    )
    parser.add_argument("--version", action="version", version=f"pgsvd-vllm {pgsvd_vllm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first_line = (module.__doc__ or "").splitlines()[0]
        module.configure(commands.add_parser(name, help=first_line, description=first_line))
    return parser


class _Stop:
    """A signal handler that turns SIGINT and SIGTERM into KeyboardInterrupt and records the signal.

    Compiled code that is interrupted inside a Python callback may raise another error instead.
    """

    received = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of this process.

    Returns:
        The exit status: 0, 1 for an internal error or a wrong result, 2 for a user's error, 130 if interrupted.
    """
    arguments = build_parser().parse_args(argv)
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores them
            signal.signal(number, stop)
    try:
        status = COMMANDS[arguments.command].run(arguments)
        print(end="", flush=True)  # a closed pipe raises here instead of at exit
        return status
    except PgsvdError as error:
        print(f"pgsvd-vllm: error: {with_flags(' '.join(str(error).split()))}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # The reader (head, less) has exited; Python must not report the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        print(f"pgsvd-vllm: interrupted{': ' if error.args else ''}{error}", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # a bug: print what a report needs
        if stop.received:
            advice = "; repeat with --resume" if hasattr(arguments, "resume") else ""
            print(f"pgsvd-vllm: interrupted{advice}", file=sys.stderr)
            return INTERRUPTED
        traceback.print_exc()
        print("pgsvd-vllm: internal error; please report it with the output of: pgsvd-vllm env", file=sys.stderr)
        return INTERNAL_ERROR
