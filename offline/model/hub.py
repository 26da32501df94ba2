"""From a model's name to a local folder: as it is, or downloaded from the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pgsvd_vllm.errors import InputError, reason_of

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md"]


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded from the hub when MODEL is no folder.

    Raises:
        InputError: neither a folder nor an id the hub (or its cache) knows.
    """
    folder = Path(model)
    if os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        return folder
    if os.path.exists(folder) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"MODEL {model}: no such folder")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = reason_of(error)
        raise InputError(f"MODEL {model}: no such folder here, and the hub does not provide it ({reason})") from None
