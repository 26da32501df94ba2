"""Rounding of matrices and of whole projections, against float64."""

import pytest
import torch

from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import FP8, INT8, KNOWN, Scheme, int4
from pgsvd_vllm.format.schema import DENSE, FactoredModule
from pgsvd_vllm.offline.factors.solvers import closed_form, relative_error
from pgsvd_vllm.offline.factors.stored_form import stored_form
from pgsvd_vllm.offline.rounding.error_compensated import Rounded, best_scale, round_matrix, to_grid
from pgsvd_vllm.offline.rounding.forms import balanced, round_projection

OUT, IN, RANK = 96, 256, 64


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [OUT, IN] and the Gram matrix of inputs with a decaying spectrum and a few large features."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.linalg.qr(random(IN, IN)).Q * torch.logspace(0, -2, IN, dtype=torch.float64)
    inputs = random(2000, IN) @ mixing.T
    inputs[:, :4] *= 20
    return random(OUT, IN) / IN**0.5, inputs.T @ inputs


def nearest(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weight rounded to nearest, with the same scales as the result of `best_scale` for equal inputs."""
    scale = best_scale(weight, torch.ones(weight.shape[1], dtype=torch.float64), scheme)
    each = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return to_grid(weight / each, scheme) * each


@pytest.mark.parametrize("scheme", KNOWN, ids=lambda scheme: scheme.key)
def test_error_compensation_beats_rounding_to_nearest(scheme: Scheme) -> None:
    weight, gram = problem()
    rounded = round_matrix(weight, gram, scheme)
    low, high = scheme.bounds
    assert rounded.values.dtype == (torch.float8_e4m3fn if scheme.type == "float" else torch.int8)
    assert float(rounded.values.double().min()) >= low
    assert float(rounded.values.double().max()) <= high
    error = relative_error(weight, gram, rounded.matrix())
    assert error < 0.75 * relative_error(weight, gram, nearest(weight, scheme))


def test_bits_order_the_errors() -> None:
    weight, gram = problem()
    errors = [relative_error(weight, gram, round_matrix(weight, gram, s).matrix()) for s in (INT8, FP8, int4(32))]
    assert errors[0] < errors[1] / 2 < errors[2]
    assert errors[0] < 0.004
    groups = [relative_error(weight, gram, round_matrix(weight, gram, int4(s)).matrix()) for s in (32, 64, 128)]
    assert groups == sorted(groups)


def test_a_scaled_problem_gives_the_same_integers() -> None:
    weight, gram = problem()
    one, other = round_matrix(weight, gram, INT8), round_matrix(weight * 2**20, gram * 2.0**-40, INT8)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.scale * 2**20, other.scale)


def test_zeros_stay_zeros() -> None:
    weight, gram = problem()
    weight[3] = 0
    for scheme in KNOWN:
        rounded = round_matrix(weight, gram, scheme)
        assert torch.isfinite(rounded.scale).all()
        assert not rounded.matrix()[3].any()
    silent = round_matrix(weight, torch.eye(IN, dtype=torch.float64), INT8)
    assert torch.allclose(silent.matrix(), nearest(weight, INT8))


def test_balanced_factors_have_the_same_product() -> None:
    weight, gram = problem()
    factors = closed_form(weight, gram, RANK)
    u, v = balanced(factors.u, factors.v, gram)
    assert torch.allclose(u @ v, factors.u @ factors.v, atol=1e-10)
    before, after = ((b @ gram @ b.T).diagonal() for b in (factors.v, v))
    assert float(after.max() / after.min()) < 20 < float(before.max() / before.min())


@pytest.mark.parametrize("scheme", [INT8, FP8, int4(32)], ids=lambda scheme: scheme.key)
@pytest.mark.parametrize("form", ["factors", "pivot", DENSE])
def test_projections_lose_little(form: str, scheme: Scheme) -> None:
    """The rounding of two factors adds about twice the error of rounding the dense weight, the pivot form more."""
    weight, gram = problem()
    factors = closed_form(weight, gram, RANK)
    plain = {"weight": weight} if form == DENSE else stored_form(factors, weight, gram, form, torch.float64)
    module = FactoredModule(0 if form == DENSE else RANK, form)
    schemes = dict.fromkeys(module.matrices, scheme)
    stored = round_projection(plain, gram, schemes)
    module = FactoredModule(module.rank, form, schemes=schemes)
    assert {suffix: tuple(tensor.shape) for suffix, tensor in stored.items()} == module.stored_shapes(OUT, IN)
    exact, found = reconstruct(plain), reconstruct(dequantized(stored, schemes))
    added = relative_error(exact, gram, found)
    alone = round_projection({"weight": weight}, gram, {"weight": scheme})
    whole = relative_error(weight, gram, reconstruct(dequantized(alone, {"weight": scheme})))
    assert added < (3 if form == "pivot" else 2.2) * whole


@pytest.mark.parametrize("inputs", [0, 50])
@pytest.mark.parametrize("form", ["factors", "pivot", DENSE])
def test_inputs_that_the_calibration_lacks_keep_their_outputs(form: str, inputs: int) -> None:
    """A Gram matrix of few different inputs, or of none, leaves directions in which every error looks harmless."""
    weight, _ = problem()
    generator = torch.Generator().manual_seed(5)
    seen = torch.randn(inputs, IN, generator=generator, dtype=torch.float64)
    gram, everywhere = seen.T @ seen, torch.eye(IN, dtype=torch.float64)
    factors = closed_form(weight, everywhere, RANK)
    plain = {"weight": weight} if form == DENSE else stored_form(factors, weight, everywhere, form, torch.float64)
    schemes = dict.fromkeys(FactoredModule(0 if form == DENSE else RANK, form).matrices, INT8)
    found = reconstruct(dequantized(round_projection(plain, gram, schemes), schemes))
    assert relative_error(reconstruct(plain), everywhere, found) < 0.05


def test_tiny_weights_do_not_vanish_in_the_scales() -> None:
    weight, gram = problem()
    for scheme in KNOWN:
        rounded = round_matrix(weight * 1e-44, gram, scheme)
        assert torch.isfinite(rounded.scale).all()
        assert (rounded.scale > 0).all()
        assert torch.isfinite(rounded.matrix()).all()


def test_the_up_factor_makes_up_for_the_down_factor() -> None:
    weight, gram = problem()
    factors = closed_form(weight, gram, RANK)
    plain = {"weight_u": factors.u, "weight_v": factors.v}
    schemes = {"weight_v": int4(32), "weight_u": INT8}
    found = reconstruct(dequantized(round_projection(plain, gram, schemes), schemes))
    u, v = balanced(factors.u, factors.v, gram)
    alone = round_matrix(v, gram, int4(32))
    assert isinstance(alone, Rounded)
    exact = factors.u @ factors.v
    assert relative_error(exact, gram, found) < 0.95 * relative_error(exact, gram, u @ alone.matrix())
