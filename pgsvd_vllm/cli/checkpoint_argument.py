"""The arguments that name a model: a folder, or an id of the Hugging Face hub with its revision."""

import argparse
import os
from pathlib import Path


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add `--revision`."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default main)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add DIR, a checkpoint of this format, and `--revision`."""
    parser.add_argument("dir", metavar="DIR", help="folder or Hugging Face id of a model written by pgsvd-vllm")
    add_revision(parser)


def checkpoint_folder(arguments: argparse.Namespace) -> Path:
    """The folder of DIR, which is downloaded if it is a hub id; raises InputError if there is none."""
    if os.path.isdir(arguments.dir) and arguments.revision is None:  # unlike Path.is_dir, also for a name too long
        return Path(arguments.dir)
    from pgsvd_vllm.offline.model.hub import resolve_folder  # imports the hub's client, which a folder does not need

    return resolve_folder(arguments.dir, revision=arguments.revision)
