"""Maps the tensors of a transformers model to the tensors of its checkpoint, which may be renamed or stacked.

transformers renames tensors while it loads them and stacks MoE experts; the mapping follows its own rules.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pgsvd_vllm.hf.moe_unstack import UnstackedExperts, without_stacking
from pgsvd_vllm.hf.transformers_compat import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor of a model is stored.

    Attributes:
        names: of the checkpoint's tensors that form it.
        patterns: the converter's pattern that each of them matches.
        converter: of transformers, which combines or changes the stored tensors; None for a tensor stored as is.
        target: name of the first tensor that the converter returns.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None
    target: str = ""

    def load(self, name: str, read: Callable[[str], torch.Tensor], model: PreTrainedModel) -> torch.Tensor:
        """Load a tensor of the model.

        Args:
            name: of the tensor in the model.
            read: reads a tensor of the checkpoint by name.
            model: may be on the meta device.

        Raises:
            KeyError: the converter returns no such tensor.
        """
        if self.converter is None:
            return read(self.names[0])
        converter: Any = deepcopy(self.converter)
        for stored, pattern in zip(self.names, self.patterns, strict=True):
            converter.add_tensor(self.target, stored, pattern, read(stored))
        found = converter.convert(self.target, model=model, config=model.config)[name]
        return found[0] if isinstance(found, list) else found


def without_weight_norm(conversions: Iterable[Any]) -> list[Any]:
    """transformers' conversions without the renaming of old weight-norm tensors, which matches every `weight_v`."""
    return [one for one in conversions if not any("parametrizations.weight" in name for name in one.target_patterns)]


def stored_tensors(model: PreTrainedModel, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Map the tensors of a model to those of its checkpoint.

    Args:
        model: may be on the meta device.
        names: of the checkpoint's tensors.

    Returns:
        tensor of the model -> how it is stored; tensors that the checkpoint lacks, such as tied ones, are absent.
    """
    conversions = without_weight_norm(get_model_conversion_mapping(model))
    if any(isinstance(module, UnstackedExperts) for module in model.modules()):
        conversions = without_stacking(conversions)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own: dict[str, Any] = dict(model.state_dict())
    found: dict[str, StoredTensor] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is None:
            found[target] = StoredTensor((name,))
        else:
            parts.setdefault(target, []).append((name, pattern))
    for target, rows in parts.items():
        converter = by_pattern[rows[0][1]]
        stored = StoredTensor(tuple(n for n, _ in rows), tuple(p for _, p in rows), converter, target)
        for other in converter.target_patterns:
            found[target.replace(converter.target_patterns[0], other, 1)] = stored
    return found
