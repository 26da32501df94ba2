"""Training of the scales of quantized matrices."""

from pathlib import Path

import pytest
import torch

from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import INT8, PACKED, SCALE, Scheme, int4, pack
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions, Dose
from pgsvd_vllm.offline.refine.distill import Distiller
from pgsvd_vllm.offline.refine.run import doses
from pgsvd_vllm.offline.refine.trained import TrainedScales
from pgsvd_vllm.offline.rounding.error_compensated import round_matrix
from tests.offline.calibration.test_gram import CPU, windows
from tests.offline.refine.test_distill import count_time_by_steps, factors_of, load_dense


def rounded(matrix: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values and scales."""
    found = round_matrix(matrix.double(), torch.eye(matrix.shape[1], dtype=torch.float64), scheme)
    return pack(found.values, scheme), found.scale


def quantized(matrices: dict[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    row: dict[str, torch.Tensor] = {}
    for suffix, matrix in matrices.items():
        row[f"{suffix}{PACKED}"], row[f"{suffix}{SCALE}"] = rounded(matrix, scheme)
    return row


@pytest.mark.parametrize("form", ["dense", "factors", "pivot"])
@pytest.mark.parametrize("scheme", [int4(32), INT8], ids=lambda s: s.key)
def test_outputs_and_gradients_are_those_of_the_stored_matrices(form: str, scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    suffixes = {"dense": [("weight", 48, 64)], "factors": [("weight_v", 32, 64), ("weight_u", 48, 32)]}
    suffixes["pivot"] = [("weight_p", 32, 64), ("weight_c", 16, 32)]
    matrices = {s: torch.randn(m, n, generator=generator) for s, m, n in suffixes[form]}
    row = quantized(matrices, scheme)
    if form == "pivot":
        row["pivots"] = torch.arange(0, 48)[torch.arange(48) % 3 != 0].int()
    schemes = dict.fromkeys(matrices, scheme)
    bias = torch.nn.Parameter(torch.randn(48, generator=generator), requires_grad=False)
    module = TrainedScales(row, schemes, bias, CPU)
    x = torch.randn(5, 64, generator=generator)

    def outputs(changes: dict[str, torch.Tensor]) -> torch.Tensor:
        """In float64, from the stored tensors."""
        own = {s: (t.double() * (1 + changes[s[: -len(SCALE)]]) if s.endswith(SCALE) else t) for s, t in row.items()}
        return x.double() @ reconstruct(dequantized(own, schemes)).T + bias.double()

    zero = {s: torch.zeros_like(row[f"{s}{SCALE}"], dtype=torch.float64).requires_grad_() for s in matrices}
    assert torch.allclose(module(x).double(), outputs(zero), atol=1e-4)
    module(x).square().sum().backward()
    outputs(zero).square().sum().backward()
    for s in matrices:
        found, expected = module.changes[s].grad, zero[s].grad
        assert found is not None
        assert expected is not None
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert all(torch.equal(tensor, row[name]) for name, tensor in module.stored().items())


def test_training_changes_scales_alone_and_lowers_the_divergence(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_time_by_steps(monkeypatch, seconds=1)
    dense, student = load_dense(tiny_model), load_dense(tiny_model)
    plain = factors_of(tiny_model, "factors", share=0.5)
    schemes, tensors = {}, {}
    for name in plain:
        scheme = int4(32)
        # Too small steps clip much, which larger scales can repair.
        row = quantized({"weight": student.get_submodule(name).weight.data}, scheme)
        row[f"weight{SCALE}"] = row[f"weight{SCALE}"] * 0.8
        tensors[name], schemes[name] = row, {"weight": scheme}
    found = Distiller(dense, student, "model.layers", tensors, schemes).run(
        windows(24, 64, seed=1), windows(4, 64, seed=2), Dose(minutes=8)
    )
    assert found.after < 0.9 * found.before
    for name, row in found.tensors.items():
        assert torch.equal(row[f"weight{PACKED}"], tensors[name][f"weight{PACKED}"])
        assert row[f"weight{SCALE}"].dtype == torch.bfloat16
        assert not torch.equal(row[f"weight{SCALE}"], tensors[name][f"weight{SCALE}"])


def test_scales_get_a_part_of_the_distillation() -> None:
    plain = FactoredModule(4)
    eight = FactoredModule(4, schemes={"weight_v": INT8, "weight_u": INT8})
    four = FactoredModule(0, "dense", schemes={"weight": int4(32)})
    dose = Dose(tokens=3000)
    assert doses(None, {"a": four}) == (None, None)
    assert doses(dose, {"a": plain}) == doses(dose, {"a": eight}) == (dose, None)
    assert doses(dose, {"a": four}) == (None, dose)
    assert doses(dose, {"a": plain, "b": four}) == (Dose(tokens=2000), Dose(tokens=1000))
    assert doses(Dose(minutes=6), {"a": plain, "b": four})[1] == Dose(minutes=2)


@pytest.mark.parametrize("ratio", [0.87, 0.92])
def test_a_run_trains_factors_and_scales(ratio: float, tiny_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    given = {"num_calibration_samples": 20, "max_seq_length": 48, "dataset": ("python-docs",)}
    compress(
        CompressOptions(str(tiny_model), tmp_path / "out", ratio=ratio, bits="auto", refine_tokens=3000, **given),
        said.append,
    )
    trained = [line for line in said if line.startswith("distilled")]
    assert len(trained) == 2
    config = open_checkpoint(tmp_path / "out").quantization_config
    assert config["refine_tokens"] == 3000
