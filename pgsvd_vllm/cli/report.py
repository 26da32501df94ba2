"""Write the report of a checkpoint: one HTML page with ranks, errors, bytes and the front, for any browser.

It needs pip install 'pgsvd-vllm[plot]', and no network.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from pgsvd_vllm.cli.model_arguments import add_checkpoint, checkpoint_folder
from pgsvd_vllm.errors import InputError, bytes_text, reason_of

# The page's name in the checkpoint's folder.
REPORT = "report.html"
CARD = "README.md"

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
        "--evaluation",
        type=Path,
        metavar="JSON",
        help="what pgsvd-vllm evaluate DIR --json JSON wrote, to be shown, and without -o to be put into the model "
        "card, DIR/README.md, as well",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; returns the exit status and raises PgsvdError."""
    evaluation = None if arguments.evaluation is None else _measured(arguments.evaluation)
    folder = checkpoint_folder(arguments)
    output = arguments.output or (folder / REPORT if os.path.isdir(arguments.dir) else Path(REPORT))
    size = write_report(folder, output, evaluation)
    print(f"wrote {output}: {bytes_text(size)}")
    if evaluation is not None and output == folder / REPORT:
        print(_add_to_card(folder, evaluation))
    return 0


def _add_to_card(folder: Path, evaluation: dict[str, Any]) -> str:
    """Put the measured quality into the model card; returns a line that says so, or why not.

    Raises:
        InputError: the card cannot be written.
    """
    from pgsvd_vllm.format.card import with_quality
    from pgsvd_vllm.offline.model.hub import public_name
    from pgsvd_vllm.report.card import quality_table

    card, own, measured = folder / CARD, public_name(str(folder)), str(evaluation.get("model"))
    if Path(measured).name != Path(own).name:
        return f"WARNING: {card} is left as it is: --evaluation is of {measured}, not of {own}"
    table = quality_table(evaluation)
    try:
        found = with_quality(card.read_text(encoding="utf-8"), table) if card.is_file() else None
        if not table or found is None:
            return f"{card} is left as it is: {'nothing was measured' if not table else 'it has no place for a table'}"
        card.write_text(found, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{card}: cannot be written ({reason_of(error)})") from None
    return f"wrote {card}: the measured quality"


def _measured(path: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote; raises InputError if another program did."""
    from pgsvd_vllm.format.reader import read_json

    found = read_json(path)
    try:
        for row in found["rows"]:
            numbers = [row.get(key) for key in ("value", "base", "recovery", "low", "high")]
            texts = (row["name"], row["unit"])
            known = all(x is None or isinstance(x, int | float) for x in numbers) and "value" in row
            if not known or not all(isinstance(x, str) for x in texts):
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
    from pgsvd_vllm.format.reader import open_checkpoint
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
