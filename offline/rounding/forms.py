"""Rounds the matrices of one projection: each is fitted to the already rounded ones before it."""

from collections.abc import Mapping

import torch

from pgsvd_vllm.format.quantization import PACKED, SCALE, Scheme, pack
from pgsvd_vllm.offline.linalg import cholesky, eigh
from pgsvd_vllm.offline.rounding.error_compensated import Rounded, round_matrix

# Share of the mean of C's diagonal that is added to its diagonal, for the rounding (GPTQ, section 3.3, step 3) and for
# all fits: inputs that the calibration set lacks must not change their outputs.
DAMPING = 0.01
# Ridge of the least-squares fit of the second factor, as a share of the mean energy of z.
RIDGE = 1e-6
# Exponent of the energies of z that moves from V to U: with 0.5 both factors have rows and columns of like size.
BALANCE = 0.25


def round_projection(
    tensors: Mapping[str, torch.Tensor], gram: torch.Tensor, schemes: Mapping[str, Scheme]
) -> dict[str, torch.Tensor]:
    """The stored tensors of a projection with quantized matrices.

    Args:
        tensors: suffix -> tensor of a form, or the weight of a dense projection.
        gram: C [in, in] of the projection's input, float64.
        schemes: suffix -> scheme of every matrix.

    Returns:
        suffix -> tensor, as `FactoredModule.suffixes` names them.

    Raises:
        torch.linalg.LinAlgError: C is not finite or not semi-definite.
    """
    gram = damped(gram)
    if "weight" in tensors:
        return _stored("weight", round_matrix(tensors["weight"].double(), gram, schemes["weight"]), schemes)
    if "pivots" in tensors:
        p, c = tensors["weight_p"].double(), tensors["weight_c"].double()
        down = round_matrix(p, gram, schemes["weight_p"])
        inner, coefficients = fit(c, p, down.matrix(), gram)
        up = round_matrix(coefficients, inner, schemes["weight_c"])
        found = _stored("weight_p", down, schemes) | _stored("weight_c", up, schemes)
        return found | {"pivots": tensors["pivots"]}
    u, v = balanced(tensors["weight_u"].double(), tensors["weight_v"].double(), gram)
    down = round_matrix(v, gram, schemes["weight_v"])
    inner, coefficients = fit(u, v, down.matrix(), gram)
    up = round_matrix(coefficients, inner, schemes["weight_u"])
    return _stored("weight_v", down, schemes) | _stored("weight_u", up, schemes)


def damped(gram: torch.Tensor) -> torch.Tensor:
    """A Gram matrix with which matrices can be rounded: C plus DAMPING times the mean of its diagonal."""
    gram = gram.clone()
    mean = gram.diagonal().mean()
    gram.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return gram


def _stored(suffix: str, rounded: Rounded, schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    packed = pack(rounded.values, schemes[suffix])
    return {f"{suffix}{PACKED}": packed, f"{suffix}{SCALE}": rounded.scale.contiguous()}


def fit(u: torch.Tensor, v: torch.Tensor, down: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The up factor that makes up for the rounding of the down factor: it has the least ||(U V - U' V') X||.

    Args:
        u, v: U [rows, r] and V [r, in], float64.
        down: V', the rounded V.
        gram: C = X X^T.

    Returns:
        V' C V'^T [r, r], and U' [rows, r].
    """
    projected = gram @ down.T
    inner = down @ projected
    root, _ = cholesky(inner, RIDGE)
    # A correction of U: the ridge keeps the old one in directions of almost no energy.
    return inner, u + torch.cholesky_solve((u @ ((v - down) @ projected)).T, root).T


def balanced(u: torch.Tensor, v: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product whose components of z have like energies.

    U V = (U T^-1) (T V) for every invertible T, at no cost. A rounding step serves all components of a row alike: rows
    of U and V must not have a few large elements. T balances the sizes of the components between U and V, and a random
    rotation then mixes them.

    Args:
        u: float64 [out, r].
        v: float64 [r, in].
        gram: C [in, in], damped.
    """
    basis, upper = torch.linalg.qr(u)
    own = upper @ v
    energy, rotation = eigh(own @ gram @ own.T)
    largest = float(energy.max())
    energy = energy.clamp_min(largest * 1e-12) if largest > 0 else torch.ones_like(energy)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(len(energy), len(energy), dtype=u.dtype, generator=generator)).Q.to(u.device)
    size = energy**BALANCE
    return (basis @ rotation * size) @ mixed, mixed.T @ ((rotation.T @ own) / size[:, None])
