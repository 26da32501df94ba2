"""Reads the rows of data sets on the Hugging Face hub or in its cache."""

import os
from collections.abc import Iterator
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.row_files import ROW_FILES, PlacedRow

# Short names of hub data sets: id, configuration and file.
HUB_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "c4": ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz"),
}


def is_hub_id(dataset: str) -> bool:
    """Whether a data set looks like OWNER/NAME[:CONFIGURATION[:SPLIT]] and is no local path."""
    local = os.path.exists(dataset) or dataset.startswith((".", "/", "~"))
    return dataset.count("/") == 1 and not local and not dataset.lower().endswith((*ROW_FILES, ".txt", ".md"))


def hub_rows(dataset: str, instead: str) -> Iterator[PlacedRow]:
    """Stream the rows of a hub data set from the hub, or from its cache if the hub cannot be reached.

    Args:
        dataset: a key of `HUB_SETS`, or OWNER/NAME with an optional :CONFIGURATION or :CONFIGURATION:SPLIT; without a
            configuration a split is named by OWNER/NAME::SPLIT.
        instead: what the user can give instead, for error messages.

    Raises:
        InputError: neither the hub nor its cache has the data set or the split, or one of its files is damaged.
    """
    name, _, chosen = dataset.partition(":")
    configuration, _, split = chosen.partition(":")
    repo, config, file = HUB_SETS.get(dataset, (name, configuration or None, None))
    try:
        splits = _open(repo, config, file)
        if split and split not in splits:
            raise InputError(f"--dataset {dataset}: has no split {split}; it has {', '.join(splits)}")
        # Without a name the split `train`, or the first one that is named so in part.
        wanted = split or min(splits, key=lambda name: (name != "train", "train" not in name))
        for number, row in enumerate(splits[wanted], 1):
            yield f"row {number}", row
    except InputError:
        raise
    except Exception as error:  # network, hub and parquet layers raise exceptions of many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = "the hub does not" if dataset in HUB_SETS else "no such file or folder, and the hub does not"
        raise InputError(f"--dataset {dataset}: {what} provide it ({reason}); {instead}") from None


def _open(repo: str, config: str | None, file: str | None) -> dict[str, Any]:
    """Split -> its rows, streamed."""
    from datasets import load_dataset

    options: dict[str, Any] = {"data_files": {"train": file}} if file else {}
    try:
        return load_dataset(repo, config, streaming=True, **options)
    except Exception as error:
        try:
            folder = snapshot_download(repo, repo_type="dataset", local_files_only=True)
        except (OSError, HFValidationError):
            raise error from None
        return load_dataset(folder, config, streaming=True, **options)
