"""Check a checkpoint completely: module table, files, shapes, checksums, JSON files, and every value for NaN.

`inspect` and `verify` work without vLLM.
"""

import argparse

from pgsvd_vllm.cli.model_arguments import add_checkpoint, checkpoint_folder

EXAMPLES = ("verify DIR",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the checkpoint and print a summary; returns the exit status, and raises CheckpointError at a fault."""
    from pgsvd_vllm.format.reader import check_data, check_json_files, open_checkpoint

    checkpoint = open_checkpoint(checkpoint_folder(arguments))
    check_json_files(checkpoint.folder)
    has_sums = check_data(checkpoint)
    files = {info.file for info in checkpoint.tensors.values()}
    print(
        f"{arguments.dir}: good: {len(checkpoint.tensors)} tensors in {len(files)} files, "
        f"{len(checkpoint.factored)} factored projections, all numbers finite, "
        + ("checksums as recorded" if has_sums else "no checksums recorded (by an early version)")
    )
    return 0
