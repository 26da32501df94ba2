"""Refuses a config.json that describes another model than the weights beside it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.weights import StoredWeights

# Keys with a number of layers, each of which has tensors of its own.
_LAYER_COUNTS = re.compile(r"(num_hidden|encoder|decoder|num|n)_layers?|depth")


def refuse_more_layers(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Refuse a number of layers that the weights cannot have, before a skeleton of so many layers is built.

    Args:
        config: config.json as read.
        tensors: number of stored tensors.
        folder: to name in errors.

    Raises:
        InputError: config.json promises more layers than there are tensors.
    """
    for key, value in _entries(config):
        if isinstance(value, int) and value > tensors and _LAYER_COUNTS.fullmatch(key):
            raise InputError(
                f"{folder}/config.json: {key} is {value}, but the model has only {tensors} tensors; correct it, or "
                "complete the download"
            )


def unknown_name(config: Mapping[str, Any], error: Exception) -> str | None:
    """What transformers looked up in vain, such as an activation function; None if the error is another one."""
    if isinstance(error, KeyError) and error.args:
        for key, value in _entries(config):
            if isinstance(value, str) and value == error.args[0]:
                return f"it knows no {key} {value!r}"
    return None


def refuse_other_class(model: PreTrainedModel, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that vLLM, which follows `architectures`, and transformers, which follows `model_type`, differ in.

    Args:
        model: as transformers builds it.
        config: config.json as read; one with modelling code of its own may have any names.
        folder: to name in errors.

    Raises:
        InputError: `architectures` lacks the class of the model.
    """
    names, built = config.get("architectures"), type(model).__name__
    if "auto_map" not in config and isinstance(names, list) and built not in names:
        raise InputError(
            f"{folder}/config.json: architectures has {', '.join(map(str, names))}, which vLLM serves, but model_type "
            f"{config.get('model_type')!r} is {built}; correct the one that does not belong to the weights"
        )


def refuse_unused_biases(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Refuse biases of layers that have none according to config.json: the model would be another one without them.

    Args:
        model: the skeleton.
        weights: of the model.

    Raises:
        InputError: a bias is stored that is not 0, and its layer has no bias; names it.
    """
    own, modules = model.state_dict().keys(), dict(model.named_modules())
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    for target, stored in weights.stored.items():
        path, _, leaf = target.rpartition(".")
        if leaf != "bias" or target in own or path not in modules or stored.converter is not None:
            continue
        if next(modules[path].parameters(recurse=False), None) is None:
            continue
        if any(re.search(pattern, target) for pattern in ignored):
            continue
        name = stored.names[0]
        if bool(weights.read(name).any()):
            raise InputError(
                f"{weights.tensors[name].file}: tensor {name} is a bias, and {type(model).__name__} has none there "
                "with this config.json; correct config.json (attention_bias, mlp_bias, architectures, model_type)"
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and value of every entry of config.json at any depth."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)
