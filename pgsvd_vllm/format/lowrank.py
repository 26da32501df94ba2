"""The linear layers of the stored forms in plain torch, and the reconstruction of dense weights from them."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from pgsvd_vllm.format.quantization import PACKED, SCALE, Scheme, dequantize, unpack
from pgsvd_vllm.format.schema import FORMS, check_pivots


def factored_linear(
    x: torch.Tensor, v: torch.Tensor, us: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = cat_i(U_i z_i) + bias with z = V x; the down-projections of all shards run as one stacked GEMM.

    Args:
        x: [..., in].
        v: [sum r_i, in], the stacked down factors of all shards.
        us: the up factors [n_i, r_i].
        bias: [sum n_i] or None.

    Returns:
        [..., sum n_i] in x's dtype.
    """
    z = F.linear(x, v).split([u.shape[1] for u in us], dim=-1)
    biases = [None] * len(us) if bias is None else bias.split([u.shape[0] for u in us])
    parts = [F.linear(part, u, b) for part, u, b in zip(z, us, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def other_rows(pivots: torch.Tensor, rows: int) -> torch.Tensor:
    """The row numbers from 0 to `rows` - 1 that are not in `pivots`.

    Args:
        pivots: int [r].
        rows: of the weight.

    Returns:
        int64 [rows - r], ascending, on the device of `pivots`.
    """
    mask = torch.ones(rows, dtype=torch.bool, device=pivots.device)
    mask[pivots.long()] = False
    return mask.nonzero()[:, 0]


def pivot_linear(
    x: torch.Tensor, p: torch.Tensor, c: torch.Tensor, pivots: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[pivots] = z and y[others] = C z with z = P x, plus bias (PIFA, arXiv 2501.19090).

    Args:
        x: [..., in].
        p: [r, in], the weight's pivot rows.
        c: [out - r, r], the coefficients of the other rows.
        pivots: int [r], the row numbers of the pivot rows.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    z = F.linear(x, p)
    y = z.new_empty(*z.shape[:-1], p.shape[0] + c.shape[0])
    y[..., pivots.long()] = z
    y[..., other_rows(pivots, y.shape[-1])] = F.linear(z, c)
    return y if bias is None else y + bias


def pivot_weight(p: torch.Tensor, c: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The dense weight [out, in] of a pivot form, in the dtype of `p`; arguments as of `pivot_linear`."""
    return pivot_linear(torch.eye(p.shape[1], dtype=p.dtype, device=p.device), p, c, pivots).T


def dequantized(
    tensors: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """A module's matrices in place of its quantized ones.

    Args:
        tensors: suffix -> stored tensor.
        schemes: of the module.
        dtype: of the matrices that were quantized.
    """
    found = {suffix: tensor for suffix, tensor in tensors.items() if not suffix.endswith((PACKED, SCALE))}
    for suffix, scheme in schemes.items():
        values, scale = unpack(tensors[f"{suffix}{PACKED}"], scheme), tensors[f"{suffix}{SCALE}"]
        found[suffix] = dequantize(values, scale, dtype)
    return found


def reconstruct(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64, name: str | None = None
) -> torch.Tensor:
    """The dense weight [out, in] of a module, reconstructed from its factors.

    Args:
        tensors: suffix -> tensor of either form, or of the form `dense`; none is quantized.
        dtype: of the computation and the result.
        name: of a module whose factors come from a file; its pivots are then validated. None for trusted factors.

    Raises:
        CheckpointError: the pivots of a named module are not ascending row numbers.
    """
    if "weight" in tensors:
        return tensors["weight"].to(dtype)
    if "pivots" in tensors:
        p, c, pivots = (tensors[suffix] for suffix in FORMS["pivot"])
        if name is not None:
            check_pivots(pivots, len(p) + len(c), f"{name}.pivots")
        return pivot_weight(p.to(dtype), c.to(dtype), pivots)
    return tensors["weight_u"].to(dtype) @ tensors["weight_v"].to(dtype)
