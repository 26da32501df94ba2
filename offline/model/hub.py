"""From a model's name to a local folder: as it is, or downloaded from the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pgsvd_vllm.errors import InputError, reason_of

# `*` crosses folders: additional_chat_templates/*.jinja are among them.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md")
REMOTE_CODE = "*.py"


def public_name(name: str) -> str:
    """A model's or data set's name without the path to it on this machine: a hub id, or a folder's or file's own name.

    A snapshot in a hub cache is named by its hub id.
    """
    if not os.path.exists(name) and not name.startswith((".", "/", "~")):
        return name
    path = Path(name).resolve()
    for part in path.parts:
        if part.startswith("models--") and "snapshots" in path.parts:
            return part.removeprefix("models--").replace("--", "/")
    return path.name


def resolve_folder(model: str, trust_remote_code: bool = False) -> Path:
    """The local folder of a model, downloaded from the hub when MODEL is no folder.

    Args:
        model: a folder, or a hub id.
        trust_remote_code: download the model's modelling code as well.

    Raises:
        InputError: neither a folder nor an id the hub (or its cache) knows.
    """
    folder = Path(model)
    if os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        return folder
    if os.path.exists(folder) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"MODEL {model}: no such folder")
    try:
        patterns = [*HUB_PATTERNS, REMOTE_CODE] if trust_remote_code else list(HUB_PATTERNS)
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = reason_of(error)
        raise InputError(f"MODEL {model}: no such folder here, and the hub does not provide it ({reason})") from None
