"""The plain definition of a factored projection, in any dtype, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def factored_linear(
    x: torch.Tensor, v: torch.Tensor, us: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = cat_i(U_i z_i) + bias with z = V x, the down factors of all shards stacked.

    Args:
        x: [..., in].
        v: [sum r_i, in], the shards' down factors one under the other.
        us: the up factors [n_i, r_i].
        bias: [sum n_i] or None.

    Returns:
        [..., sum n_i] in x's dtype.
    """
    z = F.linear(x, v).split([u.shape[1] for u in us], dim=-1)
    biases = [None] * len(us) if bias is None else bias.split([u.shape[0] for u in us])
    parts = [F.linear(part, u, b) for part, u, b in zip(z, us, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
