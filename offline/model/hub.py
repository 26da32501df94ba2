"""Resolves a model's name to a local folder, which may be downloaded from the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pgsvd_vllm.errors import InputError, reason_of
from pgsvd_vllm.offline.model.companions import COMPANIONS, REMOTE_CODE

# `*` also matches `/`, so additional_chat_templates/*.jinja are included.
HUB_PATTERNS = (*COMPANIONS, "*.safetensors", "*.md")
# A second copy of the weights in their maker's own format, and adapters beside the model.
HUB_IGNORED = ("consolidated*", "original/*", "adapter_model*")


def hub_patterns(trust_remote_code: bool) -> list[str]:
    """The patterns of the files to download; modelling code is included only with `trust_remote_code`."""
    return [*HUB_PATTERNS, REMOTE_CODE] if trust_remote_code else list(HUB_PATTERNS)


def public_name(name: str) -> str:
    """The name of a model or data set without its local path.

    Args:
        name: a hub id, a folder or a file.

    Returns:
        A hub id as it is, the hub id of a snapshot folder in a hub cache, or the last part of another path.
    """
    if not os.path.exists(name) and not name.startswith((".", "/", "~")):
        return name
    path = Path(name).resolve()
    for part in path.parts:
        if part.startswith("models--") and "snapshots" in path.parts:
            return part.removeprefix("models--").replace("--", "/")
    return path.name


def resolve_folder(model: str, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """The local folder of a model; a hub id is downloaded.

    Args:
        model: a folder, or a hub id.
        trust_remote_code: download the model's modelling code as well.
        revision: branch, tag or commit of a hub id; None for main.

    Raises:
        InputError: there is no such folder, and neither the hub nor its cache has such an id; says how to log in for
            models that need it.
    """
    if not model.strip():
        raise InputError("MODEL: is empty; name a folder or a hub id")
    folder = Path(model)
    if os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        if revision is not None:
            raise InputError(f"`revision` {revision}: is for an id of the hub; MODEL {model} is a folder")
        return folder
    if os.path.isfile(folder):
        raise InputError(f"MODEL {model}: no such folder, it is a file; pass the folder of a model in safetensors")
    if model.startswith(("http://", "https://")):
        raise InputError(f"MODEL {model}: no such folder; pass the hub id alone, such as ORGANIZATION/NAME")
    if os.path.exists(folder) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"MODEL {model}: no such folder")
    try:
        patterns = hub_patterns(trust_remote_code)
        found = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(HUB_IGNORED))
        return Path(found)
    except GatedRepoError:
        raise InputError(
            f"MODEL {model}: its owner grants access on request; ask for it on the model's page, then log in with: "
            "hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"`revision` {revision}: MODEL {model} has no such branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"MODEL {model}: no such folder, and the hub shows no such model; if it is private, log in with: "
            "hf auth login"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = reason_of(error)
        raise InputError(f"MODEL {model}: no such folder, and the hub does not provide it ({reason})") from None
