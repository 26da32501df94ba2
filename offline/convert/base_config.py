"""The config.json of the dense model from which another tool made its factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.hf.transformers_compat import CAUSAL_LM_CLASSES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from pgsvd_vllm.offline.convert.layouts import BASES

# The model type of KFAC-SVD/LEMS, which keeps the base's config in a section.
WRAPPED = "low_rank_compressed"
# The keys that the tools add to the base's config.
_OWN_KEYS = (
    *("auto_map", "truncation_ranks", "ratio", "ranks", "dobi_target_modules", "_name_or_path"),
    *("low_rank_config", "low_rank_modules", "low_rank_schema", "low_rank_format_version", "low_rank_method"),
)


def base_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config.json of the dense model, with the class of transformers.

    Args:
        config: config.json of the other tool's checkpoint.
        folder: of the checkpoint, for errors.

    Raises:
        InputError: it does not tell the dense model.
    """
    where = f"{folder}/config.json"
    found = config
    if config.get("model_type") == WRAPPED:
        section = config.get("base_config")
        if not isinstance(section, dict):
            raise InputError(f"{where}: has no base_config; name the dense model with `base`")
        found = {"model_type": config.get("base_model_type"), **section}
    kept = {key: value for key, value in found.items() if key not in _OWN_KEYS and not _is_of_bases(key)}
    kind = kept.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(f"{where}: model_type {kind!r} is none of transformers; name the dense model with `base`")
    named = kept.get("architectures")
    if not (isinstance(named, list) and any(name in CAUSAL_LM_CLASSES for name in named)):
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise InputError(f"{where}: {kind} has no causal language model in transformers; name it with `base`")
        kept["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return kept


def _is_of_bases(key: str) -> bool:
    """Whether a key describes the shared bases of Basis Sharing."""
    return key in {f"num_basis_{kind}" for kind in BASES.values()} | {f"{kind}_groups" for kind in BASES.values()}
