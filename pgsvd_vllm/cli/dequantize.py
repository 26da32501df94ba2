"""Make a dense model of a quantized one (compressed-tensors, block-wise FP8, AWQ), which compress can then start from.

What rounding has lost stays lost: the dense model that was quantized is the better start.
"""

import argparse
import shlex

from pgsvd_vllm.cli.model_arguments import add_model, add_output
from pgsvd_vllm.errors import bytes_text

EXAMPLES = ("dequantize ORGANIZATION/MODEL-FP8 -o DENSE",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser, help_text="local folder or Hugging Face id of a quantized model")
    add_output(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Write the dense model; returns the exit status and raises PgsvdError."""
    from pgsvd_vllm.offline.convert.dequantize import dequantize
    from pgsvd_vllm.offline.convert.new_folder import refuse_existing
    from pgsvd_vllm.offline.model.hub import resolve_folder

    output = arguments.output_dir
    refuse_existing(output)  # before a download
    folder = resolve_folder(arguments.model, arguments.trust_remote_code, arguments.revision)
    made = dequantize(folder, output, arguments.trust_remote_code)
    dtype = str(made.dtype).removeprefix("torch.")
    print(f"wrote {output}: {bytes_text(made.nbytes)}, dense in {dtype} (was {made.method})")
    print(f"compress it:  pgsvd-vllm compress {shlex.quote(str(output))} -o COMPRESSED --ratio 0.2")
    return 0
