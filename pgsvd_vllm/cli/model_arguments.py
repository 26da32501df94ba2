"""The arguments that name a model, a folder or an id of the Hugging Face hub with its revision, and a new folder."""

import argparse
import os
from pathlib import Path


def add_model(
    parser: argparse.ArgumentParser,
    metavar: str = "MODEL",
    help_text: str = "local model folder or Hugging Face id",
    name: str = "model",
) -> None:
    """Add a model and its `--revision`.

    Args:
        parser: of the command.
        metavar: of the model.
        help_text: of the model.
        name: of its attribute.
    """
    parser.add_argument(name, metavar=metavar, help=help_text)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default main)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add DIR, a checkpoint of this format, and `--revision`."""
    add_model(parser, "DIR", "folder or Hugging Face id of a model written by pgsvd-vllm", "dir")


def add_text_column(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--text-column`, which belongs to `--dataset`."""
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="field of the rows of --dataset that holds the text, or a list of messages, where it has none of the "
        "usual names",
    )


def add_output(parser: argparse.ArgumentParser, metavar: str = "DIR") -> None:
    """Add `--output-dir`, a folder that must not exist."""
    parser.add_argument(
        "-o", "--output-dir", required=True, type=Path, metavar=metavar, help="folder to write; must not exist"
    )


def checkpoint_folder(arguments: argparse.Namespace) -> Path:
    """The folder of DIR, which is downloaded if it is a hub id; raises InputError if there is none."""
    if os.path.isdir(arguments.dir) and arguments.revision is None:  # unlike Path.is_dir, also for a name too long
        return Path(arguments.dir)
    from pgsvd_vllm.offline.model.hub import resolve_folder  # imports the hub's client, which a folder does not need

    return resolve_folder(arguments.dir, revision=arguments.revision)
