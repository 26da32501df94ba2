"""Write the report of a checkpoint: one HTML page with ranks, errors, bytes and the front, for any browser.

It needs pip install 'pgsvd-vllm[plot]', and no network.
"""

import argparse
from pathlib import Path

from pgsvd_vllm.errors import InputError, bytes_text, reason_of
from pgsvd_vllm.format.reader import open_checkpoint, read_json

# The page's name in the checkpoint's folder.
REPORT = "report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="a folder written by pgsvd-vllm")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"page to write (default: DIR/{REPORT})")
    parser.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="what pgsvd-vllm evaluate DIR --json JSON wrote, to be shown"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; returns the exit status and raises PgsvdError."""
    evaluation = None if arguments.evaluation is None else read_json(arguments.evaluation)
    output = arguments.output or arguments.dir / REPORT
    size = write_report(arguments.dir, output, evaluation)
    print(f"wrote {output}: {bytes_text(size)}")
    return 0


def write_report(folder: Path, output: Path, evaluation: dict[str, object] | None = None) -> int:
    """Write the page of a checkpoint; returns its bytes.

    Args:
        folder: of the checkpoint.
        output: file to write.
        evaluation: what `evaluate --json` wrote.

    Raises:
        PgsvdError: the checkpoint is damaged, a library is missing, or the file cannot be written.
    """
    from pgsvd_vllm.cli.inspect import summary
    from pgsvd_vllm.report.checkpoint_report import checkpoint_report
    from pgsvd_vllm.report.content import content_of
    from pgsvd_vllm.report.page import check_libraries

    check_libraries()
    checkpoint = open_checkpoint(folder)
    facts = [(line[:22].strip(), line[22:].strip()) for line in summary(checkpoint) if line]
    try:
        page = checkpoint_report(content_of(checkpoint, facts), evaluation)
    except (AttributeError, KeyError, TypeError) as error:
        if evaluation is None:
            raise
        raise InputError(f"--evaluation: not written by pgsvd-vllm evaluate --json ({reason_of(error)})") from None
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    return len(page.encode())
