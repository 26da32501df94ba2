"""The files beside a model's weights that a checkpoint needs as well: tokenizer, processor, chat templates."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.links import stays_inside
from pgsvd_vllm.offline.model.model_folder import refuse_pointer

# Patterns of file names, in lower case.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*")
REMOTE_CODE = "*.py"
# Folders of the model -> the files in them: named chat templates, and the pooling of sentence-transformers.
FOLDERS = (("additional_chat_templates", "*.jinja"), ("[0-9]_*", "config.json"))
NOT_COPIED = (
    # What the checkpoint writes itself, or what describes weights that it does not have.
    *("config.json", "*.index.json", "pgsvd*", "*.safetensors", "*.bin"),
    *("adapter_*", "params.json", "consolidated*", "model_index.json"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    # Records of a training run, and what nobody means to publish.
    *("trainer_state.json", "*_results.json"),
    *(".*", "*secret*", "*credential*", "*passw*", "*api_key*", "*apikey*", "*access_token*", "*auth_token*"),
    *("hf_token*", "token.txt", "token.json", "service?account*"),
)
# Companions without which the checkpoint is not usable, or behaves in another way.
NEEDED = ("tokenizer*", "*vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja", "*config.json", "*.py")
# The largest tokenizers have 35 MB; larger files are data sets and the like.
MAX_BYTES = 256 * 1024**2


def find_companions(folder: Path, remote_code: bool) -> list[Path]:
    """The companions of a model, relative to its folder.

    Links are followed inside the folder and, in a hub cache, to the files of the same repository. Other links are left
    out, since a checkpoint is published: they may lead to any file of this machine.

    Args:
        folder: of the model.
        remote_code: include modelling code.

    Raises:
        InputError: a companion cannot be read, is a git-lfs pointer, is a `.json` file that is not JSON, or is a link
            that leaves the folder although the checkpoint needs it; names the file.
    """
    found = []
    for path in _candidates(folder, remote_code):
        if not stays_inside(path, folder):
            if any(fnmatchcase(path.name.lower(), pattern) for pattern in NEEDED):
                raise InputError(f"{path}: a link that leaves the model's folder; put the file itself there")
            continue
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            refuse_pointer(path)
            _refuse_broken_json(path)
            found.append(path.relative_to(folder))
    return found


def _refuse_broken_json(path: Path) -> None:
    """Refuse a `.json` file that is not JSON, such as one that is cut off: vLLM and transformers may pass it over."""
    try:
        if path.suffix.lower() == ".json":
            json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); repair or delete it") from None


def companion_data(path: Path, remote_code: bool) -> bytes:
    """The bytes of a companion's copy.

    Args:
        path: of the companion, one that `find_companions` found.
        remote_code: whether modelling code is copied as well; else configurations lose their references to it.
    """
    data = path.read_bytes()
    if remote_code or path.suffix != ".json" or b'"auto_map"' not in data:
        return data
    config = json.loads(data)
    if not isinstance(config, dict):
        return data
    return (json.dumps(without_local_code(config), indent=2, ensure_ascii=False) + "\n").encode()


def without_local_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the classes of its `auto_map` whose code lies in the model's folder.

    A checkpoint without this code would not load where code of models is trusted. Classes of other repositories,
    written `REPOSITORY--MODULE.CLASS`, stay.
    """

    def elsewhere(names: Any) -> bool:
        return all(name is None or "--" in str(name) for name in (names if isinstance(names, list) else [names]))

    found = config.get("auto_map")
    kept = {key: names for key, names in found.items() if elsewhere(names)} if isinstance(found, dict) else {}
    return {
        **{key: value for key, value in config.items() if key != "auto_map"},
        **({"auto_map": kept} if kept else {}),
    }


def _candidates(folder: Path, remote_code: bool) -> Iterator[Path]:
    """The paths whose names are those of companions."""
    patterns = (*COMPANIONS, *([REMOTE_CODE] if remote_code else []))
    excluded = (*NOT_COPIED, *([] if remote_code else [REMOTE_CODE]))
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in excluded):
            yield path
    for parent, pattern in FOLDERS:
        yield from sorted(folder.glob(f"{parent}/{pattern}"))
