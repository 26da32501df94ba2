"""Print the script that completes commands, options and files in a shell.

It needs pip install 'pgsvd-vllm[completion]'.
"""

import argparse
from pathlib import Path

from pgsvd_vllm.errors import InputError

SHELLS = ("bash", "zsh", "tcsh")
# Arguments that take a folder or a file but are text, since they may be ids of the hub as well.
PATHS = ("model", "dir", "src", "base", "against", "dataset", "eval_dataset")

EXAMPLES = (
    "completion bash > ~/.local/share/bash-completion/completions/pgsvd-vllm",
    "completion zsh > ~/.zfunc/_pgsvd-vllm",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}")


def run(arguments: argparse.Namespace) -> int:
    """Print the script; returns the exit status and raises PgsvdError."""
    try:
        import shtab
    except ImportError:
        raise InputError("completion: needs pip install 'pgsvd-vllm[completion]'") from None
    from pgsvd_vllm.cli import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    commands.help = None  # shtab omits what --help omits
    for command in commands.choices.values():
        for action in command._actions:
            if action.type is Path or action.dest in PATHS:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  (an attribute that shtab reads)
    print(shtab.complete(parser, arguments.shell))
    return 0
