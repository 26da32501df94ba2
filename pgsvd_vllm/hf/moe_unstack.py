"""A mixture's experts as linear layers of their own, as most checkpoints store them.

transformers stacks the matrices of all experts of a layer in one tensor while it loads them. Experts of different rank
cannot be stacked, and what is to be known of each one's inputs is easier asked of a module.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pgsvd_vllm.hf.transformers_compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    get_model_conversion_mapping,
)

_ONE_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight$")


@dataclass(frozen=True)
class _Leaves:
    """What a checkpoint calls the matrices of an expert."""

    gate: str
    up: str
    down: str


class _Expert(nn.Module):
    """One expert's matrices, under the checkpoint's names."""


class UnstackedExperts(nn.ModuleList):
    """In place of a module of stacked experts: `experts.3.up_proj` and its like.

    Args:
        stacked: the module, whose parameters are not kept; its activation is.
        leaves: what to call an expert's matrices.
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
        # A function, so that the module itself is no child of this one.
        self._apply_gate = stacked._apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs times their weights [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, chosen]; what is no expert's number counts as none.
            top_k_weights: [tokens, chosen].
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
    """Put `UnstackedExperts` in place of every module of stacked experts whose checkpoint has them one by one.

    Only of those whose computation transformers promises: gate and up in one matrix, no biases.

    Args:
        model: on the meta device.
        stored: names of the checkpoint's tensors.

    Returns:
        Whether there were any.
    """
    leaves, found = _stacked(model, stored)
    for path, module in found.items():
        assert leaves is not None
        model.set_submodule(path, UnstackedExperts(module, leaves))
    return bool(found)


def can_unstack(model: PreTrainedModel, stored: Iterable[str]) -> bool:
    """Whether `unstack_experts` would find any."""
    return bool(_stacked(model, stored)[1])


def _stacked(model: PreTrainedModel, stored: Iterable[str]) -> tuple[_Leaves | None, dict[str, nn.Module]]:
    leaves = _leaves_of(get_model_conversion_mapping(model))
    if leaves is None:
        return None, {}
    single = re.compile(rf"experts\.0\.{re.escape(leaves.down)}\.")
    if not any(single.search(name) for name in stored):
        return None, {}
    return leaves, {path: module for path, module in model.named_modules() if _is_stacked(module)}


def without_stacking(conversions: Iterable[Any]) -> list[Any]:
    """Less what would stack experts."""
    return [one for one in conversions if not (isinstance(one, WeightConverter) and _stacks(one))]


def _stacks(converter: WeightConverter) -> bool:
    return all(_ONE_EXPERT.search(pattern) for pattern in converter.source_patterns) and isinstance(
        converter.operations[0], MergeModulelist
    )


def _leaves_of(conversions: Iterable[Any]) -> _Leaves | None:
    """The names that a model's rules for stacking give; None where there are no rules, or others than usual."""
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
    """Whether a module says of itself that it computes what `UnstackedExperts` does."""
    return (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not (module.has_bias or module.is_transposed)
        and {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}
    )
