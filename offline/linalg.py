"""Gram matrices, their roots and factors, and the spectra of projections' outputs (PGSVD, arXiv 2510.05544, section 3).

Weights and activations may have any finite float32 magnitude, and Gram matrices may lack rank:

- Matrices of extreme magnitude are divided by a power of two before a float32 GEMM or a decomposition. Squares neither
  overflow nor vanish, and a matrix times 2^k gives the same digits times a power of two.
- A Gram matrix is positive semi-definite up to the rounding of float32. `cholesky` adds a ridge that exceeds this
  rounding; `spectrum` counts negative eigenvalues as zero.
- A zero matrix has a root, a spectrum and a Cholesky factor.

What LAPACK still refuses becomes one error that names the projection (`naming`).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite

# Columns of a Gram matrix that one GEMM computes.
GRAM_BLOCK = 256
# Largest exponent, up or down, of activations whose squares are summed in float32 as they are.
ORDINARY_EXPONENT = 32
# Factor between two ridges of `cholesky`.
RIDGE_STEP = 10.0


def exponent_of(matrix: torch.Tensor) -> int:
    """The exponent e of the largest absolute element, which is in [2^(e-1), 2^e); 0 if it is zero or not finite."""
    if not matrix.numel():
        return 0
    least, most = torch.aminmax(matrix)
    largest = max(abs(float(least)), abs(float(most)))
    return math.frexp(largest)[1] if math.isfinite(largest) else 0


def times_power(matrix: torch.Tensor, exponent: int) -> torch.Tensor:
    """The matrix times 2^exponent, exact where the result is a normal number of the matrix's dtype."""
    if abs(exponent) < 127:
        return matrix * 2.0**exponent
    # In two steps, since 2^exponent itself may lie outside the range of the dtype.
    return matrix * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def ordinary(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows times 2^-e whose squares fit into float32, and e; ordinary rows are returned as they are."""
    exponent = exponent_of(rows)
    return (rows, 0) if abs(exponent) <= ORDINARY_EXPONENT else (times_power(rows, -exponent), exponent)


def upper_numel(size: int) -> int:
    """Elements of the upper triangle of a matrix [size, size], whole blocks on the diagonal included."""
    return sum(min(GRAM_BLOCK, size - start) * (size - start) for start in range(0, size, GRAM_BLOCK))


def _mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [n, n] whose blocks below the diagonal are filled in place from those above it."""
    for start in range(0, len(matrix), GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


@dataclass(frozen=True)
class ScaledMatrix:
    """A symmetric float64 matrix of which the upper triangle is kept in float32, with its scale apart: squares of
    float32 exceed the range of float32.

    Attributes:
        upper: float32 [upper_numel(size)], rows of blocks of GRAM_BLOCK rows from the diagonal on; the largest absolute
            element is in [0.5, 1), unless all are 0.
        size: rows of the matrix.
        exponent: the matrix is that of `upper` times 2^exponent.
    """

    upper: torch.Tensor
    size: int
    exponent: int

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "ScaledMatrix":
        """The matrix, float64 [n, n], symmetric and finite, rounded to 24 binary digits."""
        exponent, size = exponent_of(matrix), len(matrix)
        blocks = [
            times_power(matrix[start : start + GRAM_BLOCK, start:], -exponent).float().flatten()
            for start in range(0, size, GRAM_BLOCK)
        ]
        return cls(torch.cat(blocks).cpu(), size, exponent)

    def double(self, device: torch.device | None = None) -> torch.Tensor:
        """The matrix in float64 [n, n], on the given device or on that of its elements."""
        upper, done = self.upper.to(device), 0
        found = torch.empty(self.size, self.size, dtype=torch.float64, device=upper.device)
        for start in range(0, self.size, GRAM_BLOCK):
            stop = min(start + GRAM_BLOCK, self.size)
            count = (stop - start) * (self.size - start)
            found[start:stop, start:] = upper[done : done + count].view(stop - start, -1)
            done += count
        return _mirrored(found).mul_(2.0**self.exponent)


def kinds(kind: str) -> tuple[str, str]:
    """The kinds of tensors that `pack` writes."""
    return kind, f"{kind}-scale"


def pack(kind: str, matrices: Mapping[str, ScaledMatrix]) -> dict[str, torch.Tensor]:
    """The tensors of a file: `kind:name` is the upper triangle, `kind-scale:name` the size and exponent of a matrix."""
    upper, scales = kinds(kind)
    found = {f"{upper}:{name}": matrix.upper for name, matrix in matrices.items()}
    return found | {f"{scales}:{name}": torch.tensor([m.size, m.exponent]) for name, m in matrices.items()}


def unpack(kind: str, found: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, ScaledMatrix]:
    """The matrices by name from the tensors of `pack`, given by kind and name; none if the kind is missing."""
    upper, scales = (found.get(one, {}) for one in kinds(kind))
    return {name: ScaledMatrix(matrix, *scales[name].tolist()) for name, matrix in upper.items()}


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn an error of LAPACK into an InputError that names a projection."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: cannot be factored ({reason}); leave it dense with `ignore` {name}") from None


def overflow(what: str, dtype: torch.dtype) -> InputError:
    """The error for numbers of the dense model that are not finite; `what` names the layer or projection and them."""
    narrow = dtype == torch.float16
    advice = "calibrate with `dtype` float32 or bfloat16" if narrow else "check the weights of the model"
    return InputError(f"{what} overflows in {dtype}; {advice}")


class _ProductSum:
    """A sum of float32 GEMMs' results, kept in parts.

    Those of rows of ordinary magnitude are added in float32 by the GEMMs themselves, those of others in float64, and so
    are whole sums (`merge`). A sum of many rows is a sum of sums therefore, whose order decides its last bits.

    Args:
        shapes: of the parts.
        device: of the rows.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device | None) -> None:
        self._shapes, self.device = shapes, device
        self._parts: dict[torch.dtype, list[torch.Tensor]] = {}

    def _in(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The parts of one dtype, zero at first."""
        if dtype not in self._parts:
            self._parts[dtype] = [torch.zeros(shape, dtype=dtype, device=self.device) for shape in self._shapes]
        return self._parts[dtype]

    def _add(self, number: int, left: torch.Tensor, right: torch.Tensor, exponent: int) -> None:
        """Add 2^exponent left^T right to a part."""
        if exponent == 0:
            self._in(torch.float32)[number].addmm_(left.T, right)
        else:
            self._in(torch.float64)[number].add_(left.T @ right, alpha=2.0**exponent)

    def merge(self, other: "_ProductSum") -> None:
        """Add another sum of the same shape, in float64."""
        for parts in other._parts.values():
            for own, part in zip(self._in(torch.float64), parts, strict=True):
                own += part.to(own.device)

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets the parts as arrays on the CPU, which are not copied on the way."""
        parts = {dtype: [part.cpu().numpy() for part in parts] for dtype, parts in self._parts.items()}
        return {**self.__dict__, "device": None, "_parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # arrays that may only be read: `merge` does no more
            parts = {dtype: [torch.from_numpy(part) for part in parts] for dtype, parts in state["_parts"].items()}
        self.__dict__.update(state, _parts=parts)


class GramSum(_ProductSum):
    """A sum of Gram matrices rows^T rows, of which blocks below the diagonal are not computed.

    Args:
        width: in, of the rows.
        device: of the rows.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.width = width
        self._starts = range(0, width, GRAM_BLOCK)
        super().__init__([(min(GRAM_BLOCK, width - start), width - start) for start in self._starts], device)

    def add(self, rows: torch.Tensor, exponent: int = 0) -> None:
        """Add 4^exponent rows^T rows; rows that are not finite leave a sum that is not.

        Args:
            rows: float32 [tokens, in].
            exponent: of rows that were divided by 2^exponent.
        """
        rows, own = ordinary(rows)
        for number, start in enumerate(self._starts):
            self._add(number, rows[:, start : start + GRAM_BLOCK], rows[:, start:], 2 * (own + exponent))

    def matrix(self) -> torch.Tensor:
        """The sum, float64 [in, in], symmetric; the sum is empty afterwards."""
        found = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        parts = list(self._parts.values())
        self._parts = {}
        for number, start in enumerate(self._starts):
            rows = found[start : start + GRAM_BLOCK, start:]
            for one in parts:
                rows += one[number]
            # A GEMM may round x_i^T x_j and x_j^T x_i differently; the solvers need an exactly symmetric matrix.
            corner = rows[:, : len(rows)]
            corner.copy_((corner + corner.T) / 2)
        return _mirrored(found)


class CrossSum(_ProductSum):
    """A sum of products left^T right.

    Args:
        left: m, the width of the left rows.
        right: n, the width of the right rows.
        device: of the rows.
    """

    def __init__(self, left: int, right: int, device: torch.device | None = None) -> None:
        super().__init__([(left, right)], device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right; rows that are not finite leave a sum that is not.

        Args:
            left: float32 [tokens, m].
            right: float32 [tokens, n].
        """
        (left, e), (right, f) = ordinary(left), ordinary(right)
        self._add(0, left, right, e + f)

    def matrix(self) -> torch.Tensor:
        """The sum, float64 [m, n]; the sum is empty afterwards."""
        parts, self._parts = self._parts, {}
        (found,) = parts.pop(torch.float64, [torch.zeros(self._shapes[0], dtype=torch.float64, device=self.device)])
        for (part,) in parts.values():
            found += part
        return found


def _exponent_of_finite(matrix: torch.Tensor) -> int:
    """`exponent_of` a matrix to decompose; raises torch.linalg.LinAlgError if it is not finite."""
    if not is_finite(matrix):
        raise torch.linalg.LinAlgError("its Gram matrix is not finite")
    return exponent_of(matrix)


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix.

    Args:
        matrix: float64 [n, n].

    Returns:
        float64 [n], ascending, and float64 [n, n], orthonormal columns; those of a zero matrix are unit vectors.

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite, or LAPACK does not converge.
    """
    exponent = _exponent_of_finite(matrix)
    values, vectors = torch.linalg.eigh(times_power(matrix, -exponent))
    return times_power(values, exponent), vectors


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of a positive semi-definite matrix, float64 [n, n]: float64 [n], descending, never negative.

    Raises:
        torch.linalg.LinAlgError: as of `eigh`.
    """
    exponent = _exponent_of_finite(matrix)
    values = torch.linalg.eigvalsh(times_power(matrix, -exponent)).flip(0).clamp_min(0)
    return times_power(values, exponent)


def cholesky(matrix: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """Lower Cholesky factor L of matrix + ridge I, for a matrix that is positive semi-definite up to rounding.

    The ridge is `share` of the mean of the diagonal. If rounding makes the matrix indefinite by more than the ridge, it
    grows by RIDGE_STEP until it does not: a semi-definite matrix leaves at least the ridge in every pivot.

    Args:
        matrix: [n, n]; only its lower triangle is read.
        share: 0 or more.

    Returns:
        float64 [n, n], and the ridge. Those of a zero matrix are the identity and 0.

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite or not semi-definite.
    """
    exponent = 2 * (_exponent_of_finite(matrix) // 2)  # even: its root is a power of two as well
    scaled = times_power(matrix.double(), -exponent)
    mean = float(scaled.diagonal().mean())
    if mean == 0:
        return torch.eye(len(scaled), dtype=torch.float64, device=scaled.device), 0.0
    rounding = len(scaled) * torch.finfo(torch.float64).eps * mean
    ridge = share * mean
    while ridge <= mean * len(scaled):
        damped = scaled.clone()
        damped.diagonal().add_(ridge)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed and root.diagonal().min().square() >= max(ridge / 2, rounding):
            return times_power(root, exponent // 2), ridge * 2.0**exponent
        ridge = RIDGE_STEP * max(ridge, rounding)
    raise torch.linalg.LinAlgError("its Gram matrix is not positive semi-definite")


def gram_root(gram: torch.Tensor) -> torch.Tensor:
    """A root S of a Gram matrix, S S^T = gram up to rounding.

    Args:
        gram: [n, n], symmetric positive semi-definite.

    Returns:
        float64 [n, n], lower triangular; zero for a zero matrix.

    Raises:
        torch.linalg.LinAlgError: as of `cholesky`.
    """
    # Any root serves, and this one takes a hundredth of the time of one from eigenvectors.
    return cholesky(gram, 0.0)[0] if gram.any() else gram.double()


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
        return spectrum(w @ gram.double() @ w.T)
    half = w @ (gram_root(gram) if root is None else root)
    return spectrum(half.T @ half)


def is_silent(squares: float, gram: torch.Tensor, energy: torch.Tensor) -> bool:
    """Whether a nonzero weight has no output on its inputs, or none beyond the rounding of `output_energy`.

    Such data says nothing about the weight: factors of any rank and any content reproduce the outputs.

    Args:
        squares: sum of the squares of the weight W [m, n]; 0 for a zero weight alone.
        gram: C, float64 [n, n].
        energy: eigenvalues of W C W^T.
    """
    rounding = 2 * len(gram) * torch.finfo(torch.float64).eps * squares * float(gram.trace())
    return squares > 0 and float(energy.sum()) <= rounding


def tail_energy(energy: torch.Tensor) -> torch.Tensor:
    """The energy that each rank r = 0 .. n removes: sums of energy[r:].

    Args:
        energy: [n].

    Returns:
        [n + 1], in the dtype of `energy`; the last element is 0.
    """
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
