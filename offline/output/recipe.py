"""Writes the recipe of a checkpoint: the options of its run, which `compress --recipe` takes for another one."""

from pathlib import Path
from typing import Any

import yaml

import pgsvd_vllm
from pgsvd_vllm.errors import escaped
from pgsvd_vllm.offline.model.hub import public_name
from pgsvd_vllm.offline.options import DEFAULT_RATIO, CompressOptions

RECIPE_NAME = "pgsvd_recipe.yaml"
TARGETS = ("ratio", "tolerance", "target_bytes", "target_loss", "target_latency")
# The options that decide what is computed, except those of other forms below.
OPTIONS = (
    *(*TARGETS, "sensitivity", "baseline", "form"),
    *("serve_on", "sequential", "bits", "num_calibration_samples", "max_seq_length", "text_column", "chat_template"),
    *("seed", "head_tolerance", "dtype"),
)


def write_recipe(folder: Path, options: CompressOptions, revision: str | None) -> None:
    """Write the options of a run, its default data set included.

    Args:
        folder: of the checkpoint.
        options: of the run.
        revision: commit of the model, or None.
    """
    name = " ".join(escaped(public_name(options.model)).split())
    model = name + (f" {revision}" if revision else "")
    text = f"""# How {model} was compressed, by pgsvd-vllm {pgsvd_vllm.__version__}. The same options again:
# pgsvd-vllm compress MODEL -o DIR --recipe {RECIPE_NAME}
# Options on the command line replace those of this file. What is not here has its default, which may depend on the
# machine. Local files are named without their folders, as if they were in the current one.
{yaml.safe_dump(recipe_of(options), sort_keys=False, allow_unicode=True)}"""
    (folder / RECIPE_NAME).write_text(text, encoding="utf-8")


def recipe_of(options: CompressOptions) -> dict[str, Any]:
    """The size, and the options that differ from their defaults, by the names of the command line."""
    plain = CompressOptions("", Path())
    found = {name: getattr(options, name) for name in OPTIONS}
    found = {name: value for name, value in found.items() if value != getattr(plain, name)}
    if not found.keys() & TARGETS:
        found = {"ratio": DEFAULT_RATIO, **found}
    if options.refine is not None:
        found["refine"] = options.refine
    elif options.refine_tokens is not None:
        found["refine"] = f"{options.refine_tokens / 1000}k"
    if options.costs is not None:
        found |= {"objective": "latency", "costs": _portable(str(options.costs))}
    if options.dataset is not None:
        found["dataset"] = [_portable(name) for name in options.dataset]
    if options.target_loss is not None:
        found.pop("sensitivity", None)  # no other is possible
    found |= {name: list(value) for name in ("ignore", "include") if (value := getattr(options, name))}
    return {name.replace("_", "-"): value for name, value in found.items()}


def _portable(name: str) -> str:
    """A data set's or file's name without its folder; a file stays one where a data set has the same name."""
    public = public_name(name)
    return public if public == name or "/" in public else f"./{public}"
