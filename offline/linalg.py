"""Gram matrices, their roots, and the spectra of projections' outputs."""

import torch

GRAM_BLOCK = 512


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows [in, in] as float64 of a float32 product; blocks below the diagonal are mirrored, not computed.

    Args:
        rows: float32 [tokens, in].
    """
    width = rows.shape[1]
    gram = rows.new_empty(width, width, dtype=torch.float64)
    for start in range(0, width, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, width)
        block = rows[:, start:stop].T @ rows[:, start:]
        gram[start:stop, start:] = block
        gram[start:, start:stop] = block.T
    return gram


def gram_root(gram: torch.Tensor) -> torch.Tensor:
    """S [n, n] float64 with S S^T = gram; directions below rounding are dropped to zero."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0).sqrt()


def output_energy(weight: torch.Tensor, gram: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """Eigenvalues of W C W^T in descending order, float64 [min(m, n)].

    Args:
        weight: [m, n].
        gram: [n, n], symmetric positive semi-definite.
        root: `gram_root(gram)`, to share it between projections of one input.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        matrix = w @ gram.double() @ w.T
    else:
        half = w @ (gram_root(gram) if root is None else root)
        matrix = half.T @ half
    return torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)


def tail_energy(energy: torch.Tensor) -> torch.Tensor:
    """What lies beyond each rank r = 0 .. len(energy): sums of energy[r:]."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
