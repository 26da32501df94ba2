"""Error-compensated rounding of one matrix: GPTQ (arXiv 2210.17323), with scales that minimise the weighted error.

The columns of W are rounded one after the other; the rounding error of each is compensated by the columns that are not
rounded yet, so that ||(W - Q) X|| stays small. The inputs X enter through the Gram matrix C = sum x x^T.
"""

from dataclasses import dataclass

import torch

from pgsvd_vllm.format.quantization import Scheme, dequantize
from pgsvd_vllm.offline.linalg import cholesky

# Columns that are compensated within a block before the block's errors reach all later columns.
BLOCK = 128
# Scales of integers that are tried, as shares of the one that clips nothing.
CLIPPED = tuple(1 - 0.04 * i for i in range(12))
_SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix.

    Attributes:
        values: int8 or float8 [rows, columns].
        scale: [rows, groups], in the dtype that the scheme stores.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """The matrix, float64 [rows, columns]."""
        return dequantize(self.values, self.scale, torch.float64)


def round_matrix(weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme) -> Rounded:
    """Round a matrix with error compensation.

    Args:
        weight: float64 [rows, columns]; the columns fit the scheme.
        gram: C, float64 [columns, columns], positive semi-definite and damped: directions without energy would take up
            any error.
        scheme: of the result.

    Raises:
        torch.linalg.LinAlgError: C is not finite or not semi-definite.
    """
    scale = best_scale(weight, gram.diagonal(), scheme)
    each = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    # Columns of large inputs come first, while all others can still compensate their errors.
    order = gram.diagonal().argsort(descending=True)
    root, _ = cholesky(gram[order][:, order], 0.0)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    left, steps = weight[:, order].clone(), each[:, order]
    values = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        part, own = left[:, block], inverse[block, block]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            column, step = part[:, j].clone(), steps[:, start + j]
            values[:, start + j] = to_grid(column / step, scheme)
            errors[:, j] = (column - values[:, start + j] * step) / own[j, j]
            part[:, j:] -= errors[:, j, None] * own[j, j:]
        left[:, start + BLOCK :] -= errors @ inverse[block, start + BLOCK :]
    found = torch.empty_like(values)
    found[:, order] = values
    return Rounded(found.to(torch.float8_e4m3fn if scheme.type == "float" else torch.int8), scale)


def best_scale(weight: torch.Tensor, energy: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale of every group with the least error of rounding to nearest, each column weighted by its input's energy.

    Args:
        weight: float64 [rows, columns].
        energy: float64 [columns].
        scheme: of the rounding.

    Returns:
        [rows, groups], in the dtype that the scheme stores; 1 for a group of zeros.
    """
    dtype, groups = _SCALE_DTYPES[scheme.scale_dtype], scheme.groups(weight.shape[1])
    parts, weights = weight.unflatten(1, (groups, -1)), energy.unflatten(0, (groups, -1))
    largest = parts.abs().amax(-1, keepdim=True)
    widest = largest / scheme.bounds[1] if scheme.type == "float" else largest / (scheme.bounds[1] + 0.5)
    widest = torch.where(largest > 0, widest.clamp_min(torch.finfo(dtype).tiny * 2), torch.ones_like(widest))
    best = found = None
    for share in (1.0,) if scheme.type == "float" else CLIPPED:
        # Rounded to its dtype first: the values belong to the scale that is stored.
        scale = (widest * share).to(dtype).double()
        error = ((to_grid(parts / scale, scheme) * scale - parts).square() * weights).sum(-1, keepdim=True)
        if best is None or found is None:
            best, found = error, scale
        else:
            found, best = torch.where(error < best, scale, found), torch.minimum(error, best)
    assert found is not None
    return found.squeeze(-1).to(dtype)


def to_grid(numbers: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Numbers in units of their scale, rounded to the nearest value of the scheme; in their own dtype."""
    inside = numbers.clamp(*scheme.bounds)
    return inside.to(torch.float8_e4m3fn).to(numbers.dtype) if scheme.type == "float" else inside.round()
