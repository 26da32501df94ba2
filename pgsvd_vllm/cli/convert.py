"""Make another tool's low-rank checkpoint servable (ASVD, SVD-LLM, KFAC-SVD/LEMS, Basis Sharing, PIFA, Dobi-SVD, ...).

The factors stay as they are, bit by bit.
"""

import argparse
import shlex
import sys

from pgsvd_vllm.cli.flags import shareable_command
from pgsvd_vllm.cli.model_arguments import add_model, add_output
from pgsvd_vllm.errors import InputError, bytes_text

EXAMPLES = (
    "convert hahnyuan/Llama-2-7b-hf-asvd90 -o DIR",
    "convert factors -o DIR --base meta-llama/Llama-2-7b-hf",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser, "SRC", "local folder or Hugging Face id of the other tool's checkpoint", "source")
    add_output(parser)
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the dense model, a folder or id, whose config.json and tokenizer are used instead of those in SRC",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint; returns the exit status and raises PgsvdError."""
    from pgsvd_vllm.offline.convert.convert import convert
    from pgsvd_vllm.offline.convert.new_folder import refuse_existing
    from pgsvd_vllm.offline.model.hub import resolve_folder

    output = arguments.output_dir
    refuse_existing(output)  # before a download
    folder = resolve_folder(arguments.source, revision=arguments.revision)
    try:
        base = None if arguments.base is None else resolve_folder(arguments.base)
    except InputError as error:
        raise InputError(str(error).replace("MODEL", "--base", 1)) from None
    made = convert(folder, output, base, arguments.base or "", shareable_command(sys.argv[1:]))
    print(
        f"wrote {output}: {made.projections} projections as {made.tool} factored them, {made.removed:.1%} of their "
        f"parameters removed, {bytes_text(made.nbytes)}"
    )
    if not made.has_tokenizer:
        print(f"WARNING: {folder} has no tokenizer; copy the base model's into {output}, or name it with --base")
    print(f"serve it:  vllm serve {shlex.quote(str(output))} --load-format pgsvd")
    return 0
