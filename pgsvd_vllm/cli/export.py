"""Make a dense model of a checkpoint, for engines that do not know low-rank factors (llama.cpp, TGI, MLX).

The dense model is as large as the base was; what compression has lost stays lost.
"""

import argparse

from pgsvd_vllm.cli.model_arguments import add_checkpoint, add_output
from pgsvd_vllm.errors import bytes_text

EXAMPLES = ("export DIR -o DENSE",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_checkpoint(parser)
    add_output(parser, "DENSE")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Write the dense model; returns the exit status and raises PgsvdError."""
    from pgsvd_vllm.offline.convert.export import export
    from pgsvd_vllm.offline.convert.new_folder import refuse_existing
    from pgsvd_vllm.offline.model.hub import resolve_folder

    output = arguments.output_dir
    refuse_existing(output)  # before a download
    folder = resolve_folder(arguments.dir, arguments.trust_remote_code, arguments.revision)
    made = export(folder, output, arguments.trust_remote_code)
    print(
        f"wrote {output}: {made.projections} projections made dense, "
        f"{bytes_text(made.nbytes)} (the checkpoint has {bytes_text(made.nbytes_before)})"
    )
    return 0
