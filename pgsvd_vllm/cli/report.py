"""Write the report of a checkpoint: one HTML page with ranks, errors, bytes and the front, for any browser.

It needs pip install 'pgsvd-vllm[plot]', and no network.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from pgsvd_vllm.cli.model_arguments import add_checkpoint, checkpoint_folder
from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.format.reader import open_checkpoint, read_json

# The page's name in the checkpoint's folder.
REPORT = "report.html"

EXAMPLES = (
    "report DIR",
    "report DIR --evaluation result.json -o page.html",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_checkpoint(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write (default: DIR/{REPORT}, or ./{REPORT} for an id)",
    )
    parser.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="what pgsvd-vllm evaluate DIR --json JSON wrote, to be shown"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; returns the exit status and raises PgsvdError."""
    evaluation = None if arguments.evaluation is None else _measured(arguments.evaluation)
    folder = checkpoint_folder(arguments)
    output = arguments.output or (folder / REPORT if os.path.isdir(arguments.dir) else Path(REPORT))
    size = write_report(folder, output, evaluation)
    print(f"wrote {output}: {bytes_text(size)}")
    return 0


def _measured(path: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote; raises InputError if another program did."""
    found = read_json(path)
    try:
        for row in found["rows"]:
            numbers = [row.get(key) for key in ("value", "base", "recovery", "low", "high")]
            if not isinstance(row["name"], str) or not all(x is None or isinstance(x, int | float) for x in numbers):
                raise TypeError("a row has values of other types")
        for answer in found["answers"]:
            if not isinstance(answer["prompt"], str):
                raise TypeError("a prompt is no text")
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--evaluation {path}: not written by pgsvd-vllm evaluate --json ({error})") from None
    return found


def write_report(folder: Path, output: Path, evaluation: dict[str, Any] | None = None) -> int:
    """Write the page of a checkpoint; returns its bytes.

    Args:
        folder: of the checkpoint.
        output: file to write.
        evaluation: what `evaluate --json` wrote.

    Raises:
        PgsvdError: the checkpoint is damaged, a library is missing, or the file cannot be written.
    """
    from pgsvd_vllm.cli.inspect import facts
    from pgsvd_vllm.report.checkpoint_report import checkpoint_report
    from pgsvd_vllm.report.content import content_of
    from pgsvd_vllm.report.page import check_libraries

    check_libraries()
    checkpoint = open_checkpoint(folder)
    page = checkpoint_report(content_of(checkpoint, facts(checkpoint)), evaluation)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    return len(page.encode())
