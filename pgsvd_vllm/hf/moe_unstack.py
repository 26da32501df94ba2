"""Replaces stacked MoE experts of a transformers model by one linear layer per matrix, as most checkpoints store them.

transformers stacks the matrices of all experts of a layer in one tensor while it loads them. Factors of different rank
cannot be stacked, and the inputs of each expert are measured by hooks on its own module.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pgsvd_vllm.families import FIRST_EXPERT, ONE_EXPERT, STACKED_EXPERTS
from pgsvd_vllm.hf.transformers_compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    get_model_conversion_mapping,
)

_ONE_EXPERT = re.compile(ONE_EXPERT)


@dataclass(frozen=True)
class _Leaves:
    """The checkpoint's names of the matrices of an expert, such as `gate_proj`."""

    gate: str
    up: str
    down: str


class _Expert(nn.Module):
    """One expert's matrices, under the checkpoint's names."""


class UnstackedExperts(nn.ModuleList):
    """MoE experts as linear layers such as `experts.3.up_proj`, in place of a module of stacked experts.

    Args:
        stacked: the module of stacked experts; its activation is kept, its parameters are not.
        leaves: names of an expert's matrices.
    """

    def __init__(self, stacked: Any, leaves: _Leaves) -> None:
        count, double, hidden = stacked.gate_up_proj.shape
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": stacked.gate_up_proj.dtype}
        experts = []
        for _ in range(count):
            expert = _Expert()
            expert.add_module(leaves.gate, nn.Linear(hidden, double // 2, **options))
            expert.add_module(leaves.up, nn.Linear(hidden, double // 2, **options))
            expert.add_module(leaves.down, nn.Linear(double // 2, hidden, **options))
            experts.append(expert)
        super().__init__(experts)
        self._leaves = leaves
        # The bound method, since the module itself would become a child of this one.
        self._apply_gate = stacked._apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, top_k]; values that are no expert's number are skipped.
            top_k_weights: [tokens, top_k].

        Returns:
            [tokens, hidden], in the dtype of `hidden_states`.
        """
        result = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= len(self):
                continue
            token, position = torch.where(top_k_index == number)
            expert = self[number]
            x = hidden_states[token]
            gate_up = [expert.get_submodule(name)(x) for name in (self._leaves.gate, self._leaves.up)]
            y = expert.get_submodule(self._leaves.down)(self._apply_gate(torch.cat(gate_up, dim=-1)))
            result.index_add_(0, token, (y * top_k_weights[token, position, None]).to(result.dtype))
        return result


def unstack_experts(model: PreTrainedModel, stored: Iterable[str]) -> bool:
    """Replace every module of stacked experts by `UnstackedExperts` if the checkpoint stores experts one by one.

    Only modules with the usual computation are replaced: gate and up in one matrix, no biases.

    Args:
        model: on the meta device; it is changed.
        stored: names of the checkpoint's tensors.

    Returns:
        Whether any module was replaced.
    """
    leaves, found = _stacked(model, stored)
    for path, module in found.items():
        assert leaves is not None
        model.set_submodule(path, UnstackedExperts(module, leaves))
    return bool(found)


def can_unstack(model: PreTrainedModel, stored: Iterable[str]) -> bool:
    """Whether `unstack_experts` would replace any module."""
    return bool(_stacked(model, stored)[1])


def _stacked(model: PreTrainedModel, stored: Iterable[str]) -> tuple[_Leaves | None, dict[str, nn.Module]]:
    """The names of an expert's matrices, and path -> module of all stacked experts that can be replaced."""
    leaves = _leaves_of(get_model_conversion_mapping(model))
    if leaves is None:
        return None, {}
    single = re.compile(FIRST_EXPERT.format(leaf=re.escape(leaves.down)))
    if not any(single.search(name) for name in stored):
        return None, {}
    return leaves, {path: module for path, module in model.named_modules() if _is_stacked(module)}


def without_stacking(conversions: Iterable[Any]) -> list[Any]:
    """transformers' conversions without those that stack MoE experts."""
    return [c for c in conversions if not (isinstance(c, WeightConverter) and _stacks(c))]


def _stacks(converter: WeightConverter) -> bool:
    """Whether a converter stacks the matrices of MoE experts."""
    return all(_ONE_EXPERT.search(pattern) for pattern in converter.source_patterns) and isinstance(
        converter.operations[0], MergeModulelist
    )


def _leaves_of(conversions: Iterable[Any]) -> _Leaves | None:
    """The names of an expert's matrices in a model's conversions; None if it has none or unusual ones."""
    gate = up = down = None
    for one in conversions:
        if not (isinstance(one, WeightConverter) and _stacks(one)):
            continue
        names = [found[1] for pattern in one.source_patterns if (found := _ONE_EXPERT.search(pattern))]
        kinds = [type(operation) for operation in one.operations]
        if len(names) == 2 and kinds == [MergeModulelist, Concatenate]:
            gate, up = names
        elif len(names) == 1 and kinds == [MergeModulelist]:
            down = names[0]
    return _Leaves(gate, up, down) if gate and up and down else None


def _is_stacked(module: Any) -> bool:
    """Whether the attributes of a module declare the computation of `UnstackedExperts`."""
    return (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not (module.has_bias or module.is_transposed)
        and {name for name, _ in module.named_parameters()} == STACKED_EXPERTS
    )
