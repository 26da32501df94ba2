"""A layer's products on GPUs: the Triton kernels for few tokens, torch's products for many.

PGSVD_KERNELS=torch takes torch's for all.
"""

import os
from collections.abc import Sequence

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.kernels.launch import MOST_SHARDS, PackedLayer, Workspace, run, run_library
from pgsvd_vllm.kernels.tiles import MOST_TOKENS

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


class TritonProducts:
    """The products of a layer whose weights the kernels can take.

    Args: as of PackedLayer.

    Raises:
        ValueError: they cannot.
    """

    def __init__(
        self,
        readers: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor | None],
        places: Sequence[torch.Tensor | None],
    ) -> None:
        self.layer = PackedLayer(readers, ups, places)
        device = readers[0].device
        self.workspace = _workspaces.setdefault(device, Workspace(device))
        self.workspace.reserve(len(self.layer.v), self.layer.columns)
        self.most_tokens = MOST_TOKENS if wants_triton() else 0
        # The launch attribute and the instructions exist from Hopper on.
        on_cuda = device.type == "cuda" and not torch.version.hip
        self.overlap = on_cuda and torch.cuda.get_device_capability(device)[0] >= 9
        # Compiled now and not under a request: one number of tokens for each tile.
        for tokens in (1, 17, 65) if self.most_tokens else ():
            self(readers[0].new_zeros(tokens, self.layer.columns))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        if len(x) <= self.most_tokens:
            return run(x, self.layer, self.workspace, bias, overlap=self.overlap)
        return run_library(x, self.layer, bias)
