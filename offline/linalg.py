"""Gram matrices, their roots, and the spectra of projections' outputs (PGSVD, arXiv 2510.05544, section 3)."""

import torch

# Columns of a Gram matrix that one GEMM computes.
GRAM_BLOCK = 512


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows, from float32 GEMMs; blocks below the diagonal are mirrored instead of computed.

    Args:
        rows: float32 [tokens, in].

    Returns:
        float64 [in, in], symmetric.
    """
    width = rows.shape[1]
    gram = rows.new_empty(width, width, dtype=torch.float64)
    for start in range(0, width, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, width)
        block = rows[:, start:stop].T @ rows[:, start:]
        # A GEMM may round x_i^T x_j and x_j^T x_i differently; the solvers need an exactly symmetric matrix.
        corner = block[:, : stop - start]
        corner.copy_((corner + corner.T) / 2)
        gram[start:stop, start:] = block
        gram[start:, start:stop] = block.T
    return gram


def gram_root(gram: torch.Tensor) -> torch.Tensor:
    """A root S of a Gram matrix, S S^T = gram; negative eigenvalues, which are rounding errors, count as zero.

    Args:
        gram: [n, n], symmetric positive semi-definite.

    Returns:
        float64 [n, n].
    """
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0).sqrt()


def output_energy(weight: torch.Tensor, gram: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """Eigenvalues of W C W^T, the energy of each direction of a projection's output.

    Args:
        weight: W [m, n].
        gram: C [n, n], symmetric positive semi-definite.
        root: `gram_root(gram)`, if projections with the same input share it.

    Returns:
        float64 [min(m, n)], descending, never negative.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        matrix = w @ gram.double() @ w.T
    else:
        half = w @ (gram_root(gram) if root is None else root)
        matrix = half.T @ half
    return torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)


def tail_energy(energy: torch.Tensor) -> torch.Tensor:
    """The energy that each rank r = 0 .. n removes: sums of energy[r:].

    Args:
        energy: [n].

    Returns:
        [n + 1], in the dtype of `energy`; the last element is 0.
    """
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
