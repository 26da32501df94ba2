"""z in blocks: one a rank of tensor parallelism, each filled up with zeros to whole alignments."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# What lies between a layer's products: z of this rank's low-rank shards, side by side [tokens, all of them] -> what
# the up products read.
Collective = Callable[[torch.Tensor], torch.Tensor]


def spread(up: torch.Tensor, blocks: int, width: int, missing: int) -> torch.Tensor:
    """An up factor for such a z.

    Args:
        up: [rows, r]; r may be less than blocks * width.
        blocks, width, missing: of z: how many, components of each, zeros that end each.

    Returns:
        [rows, blocks * (width + missing)].
    """
    rows, rank = up.shape
    if blocks == 1:
        return F.pad(up, (0, width - rank + missing))
    whole = F.pad(up, (0, blocks * width - rank)).view(rows, blocks, width)
    return F.pad(whole, (0, missing)).reshape(rows, blocks * (width + missing))


def columns_of(components: torch.Tensor, width: int, missing: int) -> torch.Tensor:
    """Where components of z, int64, lie in such a z."""
    return components + components // width * missing
