"""Factors where the served model has a plain matrix: they are multiplied back as they are loaded."""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import multiplied
from pgsvd_vllm.format.schema import FactoredModule


def patterns(modules: Mapping[str, FactoredModule]) -> list[str]:
    """What --ignore takes, in quotes, for modules and those like them in other layers.

    Args:
        modules: by name; of one with several names the first, the checkpoint's, counts.
    """
    first: dict[int, str] = {}
    for name, module in modules.items():
        first.setdefault(id(module), name)
    return list(dict.fromkeys(f"'{re.sub(r'[.][0-9]+(?=[.])', '.*', name)}'" for name in first.values()))


def reconstructed_weights(
    weights: Iterable[tuple[str, torch.Tensor]], modules: Mapping[str, FactoredModule]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, with `P.weight` in place of the factors of some modules P.

    Args:
        weights: names and tensors, in any order.
        modules: those that are to be dense.

    Raises:
        CheckpointError: some of a module's factors do not come.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        parent, _, kind = name.rpartition(".")
        module = modules.get(parent)
        if module is None or kind not in module.suffixes:
            yield name, tensor
            continue
        parts = waiting.setdefault(parent, {})
        parts[kind] = tensor.clone()  # not a view of the file, which may be closed when the last one comes
        if len(parts) == len(module.suffixes):
            dtype = parts[module.suffixes[0]].dtype
            yield f"{parent}.weight", multiplied(parent, module, waiting.pop(parent)).to(dtype)
    for parent in waiting:
        raise CheckpointError(f"{parent}: not all of its factors are in the checkpoint")
