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
    z = F.linear(x, v)
    parts, start = [], 0
    for u in us:
        parts.append(F.linear(z[..., start : start + u.shape[1]], u))
        start += u.shape[1]
    y = torch.cat(parts, dim=-1)
    return y if bias is None else y + bias
