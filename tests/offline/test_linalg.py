"""Gram matrices and decompositions of any magnitude and rank, against float64."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.linalg import (
    CrossSum,
    GramSum,
    ScaledMatrix,
    cholesky,
    eigh,
    gram_root,
    is_silent,
    naming,
    output_energy,
    pack,
    spectrum,
    unpack,
    upper_numel,
)
from tests.conftest import ROOT

# Exponents of float32: of denormal, tiny, ordinary, huge numbers.
EXPONENTS = (-140, -100, -40, 0, 40, 100, 125)

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from pgsvd_vllm.offline.linalg import GramSum
generator = torch.Generator().manual_seed(0)
for tokens, width in ((97, 131), (4096, 128), (600, 1023)):
    rows = torch.randn(tokens, width, generator=generator)
    total = GramSum(width)
    total.add(rows)
    gram = total.matrix()
    assert torch.equal(gram, gram.T), (tokens, width)
    torch.testing.assert_close(gram, rows.double().T @ rows.double(), rtol=1e-4, atol=1e-2)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_gram_matrices_are_exactly_symmetric(instructions: str) -> None:
    """With AVX2, MKL's float32 GEMM rounds the two triangles of x^T x differently."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def rows(exponent: int, tokens: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Integers from -4 to 4 times a power of two: exact in float32, and so are their inner products."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-4, 5, (tokens, width), generator=generator).double()
    return (whole * 2.0**exponent).float()


def summed(*parts: torch.Tensor) -> torch.Tensor:
    total = GramSum(parts[0].shape[1])
    for part in parts:
        total.add(part)
    return total.matrix()


def test_sums_of_gram_matrices_are_exact() -> None:
    """Over several blocks of columns, of rows of different magnitudes, with exponents that the rows lack."""
    parts = [rows(exponent, width=600, seed=seed) for seed, exponent in enumerate((0, -40, 3))]
    exact = sum((part.double().T @ part.double() for part in parts), start=torch.zeros(600, 600).double())
    # The smallest ones are below float64's last digit of the others, unless these cancel.
    torch.testing.assert_close(summed(*parts), exact, rtol=0, atol=2.0**-60)
    assert torch.equal(summed(parts[1]), parts[1].double().T @ parts[1].double())
    total = GramSum(600)
    for part in parts:
        total.add(part, exponent=-50)
    torch.testing.assert_close(total.matrix(), exact * 2.0**-100, rtol=0, atol=2.0**-160)
    halves = [GramSum(600), GramSum(600)]
    halves[0].add(parts[0])
    halves[1].add(parts[2])
    halves[0].merge(pickle.loads(pickle.dumps(halves[1])))
    assert torch.equal(halves[0].matrix(), summed(parts[0], parts[2]))
    assert not halves[0].matrix().any()


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_gram_matrices_are_exact_at_any_magnitude(exponent: int) -> None:
    x, y = rows(exponent), rows(-exponent // 2, width=4, seed=1)
    assert torch.equal(summed(x), x.double().T @ x.double())
    cross = CrossSum(6, 4)
    cross.add(x, y)
    assert torch.equal(cross.matrix(), x.double().T @ y.double())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_rows_give_an_infinite_gram_matrix(bad: float) -> None:
    x = rows(0)
    x[3, 2] = bad
    assert not torch.isfinite(summed(x)).all()


@pytest.mark.parametrize("exponent", [-500, -300, 0, 3, 300, 400])
def test_decompositions_scale_with_powers_of_two(exponent: int) -> None:
    """As large as products of four float32 numbers, whose squares exceed float64."""
    x = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram, factor = x.T @ x, 2.0**exponent
    (values, vectors), (scaled, same) = eigh(gram), eigh(gram * factor)
    assert torch.equal(scaled, values * factor)
    assert torch.equal(same, vectors)
    assert torch.equal(spectrum(gram * factor), spectrum(gram) * factor)
    root, ridge = cholesky(gram * factor, 0.1)
    exact = gram * factor + ridge * torch.eye(20, dtype=torch.float64)
    assert ridge == pytest.approx(0.1 * float(gram.diagonal().mean()) * factor)
    torch.testing.assert_close(root @ root.T / factor, exact / factor, rtol=1e-12, atol=1e-12)
    if exponent % 2 == 0:
        assert torch.equal(root, cholesky(gram, 0.1)[0] * 2.0 ** (exponent // 2))


def test_zero_matrices_have_factors() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(cholesky(zero, 0.1)[0], torch.eye(4, dtype=torch.float64))
    assert cholesky(zero, 0.1)[1] == 0
    assert not gram_root(zero).any()
    assert not spectrum(zero).any()
    assert torch.equal(eigh(zero)[1].T @ eigh(zero)[1], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("share", [0, 1e-8, 1e-3])
def test_the_ridge_exceeds_the_rounding_of_a_gram_matrix(share: float) -> None:
    """One input a million times as large as the others, rounded to float32: indefinite by more than the ridge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 50, dtype=torch.float64, generator=generator) * 1e-6 + torch.randn(
        300, 1, dtype=torch.float64, generator=generator
    )
    gram = (x.T @ x).float().double()
    least = float(torch.linalg.eigvalsh(gram)[0])
    assert least < -1e-8 * float(gram.trace())
    root, ridge = cholesky(gram, share)
    assert ridge >= -least
    assert ridge <= 1e-4 * float(gram.trace())
    exact = gram + ridge * torch.eye(50, dtype=torch.float64)
    assert (root @ root.T - exact).norm() <= 1e-12 * exact.norm()


def test_definite_matrices_get_no_larger_ridge() -> None:
    x = torch.randn(300, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    assert cholesky(gram, 0)[1] == 0
    assert torch.equal(cholesky(gram, 0)[0], torch.linalg.cholesky(gram))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_what_is_no_gram_matrix_is_named(bad: float) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = bad
    with (
        pytest.raises(
            InputError, match=r"p\.q_proj: cannot be factored \(.*\); leave it dense with `ignore` p\.q_proj"
        ),
        naming("p.q_proj"),
    ):
        cholesky(matrix, 0.1)
    if bad != -1:
        with pytest.raises(InputError, match=r"^p: cannot be factored"), naming("p"):
            eigh(matrix)


def test_the_upper_triangle_is_half_a_matrix() -> None:
    assert [upper_numel(size) for size in (1, 256, 257)] == [1, 256 * 256, 256 * 257 + 1]
    assert upper_numel(11008) < 0.52 * 11008**2


@pytest.mark.parametrize("size", [5, 256, 600])
@pytest.mark.parametrize("exponent", [-300, -149, 0, 200])
def test_stored_matrices_keep_their_scale(exponent: int, size: int) -> None:
    half = rows(0, size, size).double()
    matrix = ((half + half.T) / 2).float().double() * 2.0**exponent
    stored = {"a.b": ScaledMatrix.of(matrix), "zero": ScaledMatrix.of(0 * matrix)}
    assert stored["a.b"].upper.dtype == torch.float32
    assert stored["a.b"].upper.numel() == upper_numel(size)
    assert 0.5 <= float(stored["a.b"].upper.abs().max()) < 1
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in pack("gram", stored).items():
        kind, _, name = key.partition(":")
        found.setdefault(kind, {})[name] = tensor
    read = unpack("gram", found)
    assert torch.equal(read["a.b"].double(), matrix)
    assert not read["zero"].double().any()
    assert unpack("moment", found) == {}


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e30])
def test_silence_is_relative_and_ignores_zero_weights(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale for shape in ((3, 9), (5, 9)))
    gram = x.T @ x
    # Rows of `blind` are orthogonal to all inputs.
    blind = w - w @ torch.linalg.pinv(x) @ x

    def silent(weight: torch.Tensor) -> bool:
        return is_silent(float(weight.square().sum()), gram, output_energy(weight, gram))

    assert not silent(w)
    assert silent(blind)
    assert not silent(0 * w)
    assert is_silent(float(w.square().sum()), 0 * gram, output_energy(w, 0 * gram))
