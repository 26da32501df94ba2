"""z in blocks, one for each tensor-parallel rank, each padded with zeros to whole alignments."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# The collective between a layer's GEMMs: z of this rank's low-rank shards, side by side [tokens, sum of widths] -> the
# input of the up GEMMs.
Collective = Callable[[torch.Tensor], torch.Tensor]


def spread(up: torch.Tensor, blocks: int, width: int, missing: int) -> torch.Tensor:
    """An up factor for such a z.

    Args:
        up: [rows, r]; r may be less than blocks * width.
        blocks, width, missing: of z: blocks, components of each, zeros at the end of each.

    Returns:
        [rows, blocks * (width + missing)].
    """
    rows, rank = up.shape
    if blocks == 1:
        return F.pad(up, (0, width - rank + missing))
    whole = F.pad(up, (0, blocks * width - rank)).view(rows, blocks, width)
    return F.pad(whole, (0, missing)).reshape(rows, blocks * (width + missing))


def columns_of(components: torch.Tensor, width: int, missing: int) -> torch.Tensor:
    """The columns, int64, of components of z in such a padded z."""
    return components + components // width * missing
