"""Dense fallback: weights reconstructed at load, where vLLM's model has a dense layer for a factored module."""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.schema import FactoredModule


def patterns(modules: Mapping[str, FactoredModule]) -> list[str]:
    """Patterns for --ignore, in quotes, that match modules and their siblings in other layers.

    Args:
        modules: by name; the first of several names is the checkpoint's, and is used.
    """
    first: dict[int, str] = {}
    for name, module in modules.items():
        first.setdefault(id(module), name)
    return list(dict.fromkeys(f"'{re.sub(r'[.][0-9]+(?=[.])', '.*', name)}'" for name in first.values()))


def reconstructed_weights(
    weights: Iterable[tuple[str, torch.Tensor]], modules: Mapping[str, FactoredModule]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, with `P.weight` [out, in] in place of the factors of some modules P.

    Args:
        weights: names and tensors, in any order.
        modules: to be reconstructed, in float32, and stored in the factors' dtype.

    Raises:
        CheckpointError: some of a module's factors are missing or not finite, or its pivots are wrong.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        parent, _, kind = name.rpartition(".")
        module = modules.get(parent)
        if module is None or kind not in module.suffixes:
            yield name, tensor
            continue
        parts = waiting.setdefault(parent, {})
        parts[kind] = tensor.clone()  # a copy: the file may be closed before the module's last factor comes
        if len(parts) == len(module.suffixes):
            parts = dequantized(waiting.pop(parent), module.schemes, torch.float32)
            weight = reconstruct(parts, torch.float32, parent)
            # vLLM converts what was quantized to the model's dtype.
            weight = weight if module.schemes else weight.to(parts[module.matrices[0]].dtype)
            check_finite(weight, f"{parent}.weight")
            yield f"{parent}.weight", weight
    for parent in waiting:
        raise CheckpointError(f"{parent}: not all of its factors are in the checkpoint")
