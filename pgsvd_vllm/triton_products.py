"""A layer's products on GPUs: the Triton kernels for few tokens, torch's products for many.

PGSVD_KERNELS=torch takes torch's for all.
"""

import os
from collections.abc import Sequence

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.kernels.launch import MOST_SHARDS, PackedLayer, Workspace, can_overlap, run, run_library
from pgsvd_vllm.kernels.tiles import CHANGES, MOST_TOKENS

__all__ = ["MOST_SHARDS", "TritonProducts", "wants_triton"]

VARIABLE = "PGSVD_KERNELS"
CHOICES = ("triton", "torch")
# One a device: layers run one after the other.
_workspaces: dict[torch.device, Workspace] = {}


def wants_triton() -> bool:
    """Whether few tokens go through the Triton kernels.

    Raises:
        InputError: PGSVD_KERNELS is something else than its choices.
    """
    chosen = os.environ.get(VARIABLE, CHOICES[0])
    if chosen not in CHOICES:
        raise InputError(f"{VARIABLE}={chosen}: must be {' or '.join(CHOICES)}")
    return chosen == "triton"


def _suits(dtype: torch.dtype, device: torch.device) -> bool:
    """float32 spills registers or does not fit; before Ampere there are no tensor cores for what is compiled."""
    if dtype == torch.float32:
        return False
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


class TritonProducts:
    """The products of a layer whose weights the kernels can take.

    Args:
        readers, ups, places: as of PackedLayer.
        has_bias: whether the layer may be called with one.

    Raises:
        ValueError: the kernels cannot take them.
    """

    def __init__(
        self,
        readers: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor | None],
        has_bias: bool,
    ) -> None:
        self.layer = PackedLayer(readers, ups, places)
        device = readers[0].device
        if device not in _workspaces:
            _workspaces[device] = Workspace(device)
        self.workspace = _workspaces[device]
        self.most_tokens = MOST_TOKENS if wants_triton() and _suits(self.layer.dtype, device) else 0
        self.overlap = can_overlap(device)
        if self.most_tokens:
            self.workspace.reserve(len(self.layer.v), self.layer.columns)
            self._compile(has_bias)

    def _compile(self, has_bias: bool) -> None:
        """Run every kernel once, which otherwise would be compiled under a request."""
        for tokens in CHANGES:
            x = self.layer.v.new_zeros(tokens, self.layer.columns)
            self(x)
            if has_bias:
                self(x, self.layer.v.new_zeros(self.layer.out))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        if len(x) <= self.most_tokens:
            return run(x, self.layer, self.workspace, bias, overlap=self.overlap)
        return run_library(x, self.layer, bias)
