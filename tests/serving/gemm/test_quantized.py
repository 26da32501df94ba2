"""The GEMMs of layers with quantized matrices, against float64."""

import gc
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix, stacked
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms
from pgsvd_vllm.serving.vllm_compat.quantized_gemm import quantized_gemm

pytestmark = pytest.mark.usefixtures("vllm_world")
IN, RANKS, OUTS = 256, (64, 32), (96, 64)
KINDS = {"int8": (torch.int8, 8, 1), "int4": (torch.int8, 4, 8), "fp8": (torch.float8_e4m3fn, 8, 1)}


def matrix(kind: str, rows: int, columns: int, seed: int) -> QuantizedMatrix:
    dtype, bits, parts = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        values = (100 * torch.randn(rows, columns, generator=generator)).clamp(-448, 448).to(dtype)
    else:
        values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(dtype)
    groups = columns // 32 if parts > 1 else 1
    scale = (torch.rand(rows, groups, generator=generator) + 0.5) / values.float().std() / columns**0.5
    return QuantizedMatrix(values, scale.bfloat16().float(), bits)


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Activations as the INT8 kernels see them: integers times one scale per token."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / scale).round() * scale


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def inputs(tokens: int, columns: int = IN) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(9)).bfloat16()


def flags() -> set[str]:
    """The instruction sets of this CPU, by the operating system."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


HAS_VNNI = bool(flags() & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
HAS_AVX512 = "avx512f" in flags()


def test_kernels_are_those_that_this_cpu_computes_right() -> None:
    """Without VNNI oneDNN's INT8 sums saturate: errors of 14 %; without AVX-512 vLLM has no INT4 kernel."""
    assert (quantized_gemm(matrix("int8", 96, IN, 0), torch.bfloat16) is not None) == HAS_VNNI
    assert (quantized_gemm(matrix("int4", 96, IN, 0), torch.bfloat16) is not None) == HAS_AVX512


@pytest.mark.skipif(not HAS_VNNI, reason="this CPU has no VNNI: INT8 is dequantized")
@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_int8_is_exact_up_to_the_rounding_of_outputs(tokens: int) -> None:
    weight, x = matrix("int8", 96, IN, 0), inputs(tokens)
    run = quantized_gemm(weight, torch.bfloat16)
    assert run is not None
    assert error(run(x, None), by_token(x) @ weight.double().T) < 2**-8
    bias = torch.ones(96, dtype=torch.bfloat16)
    assert error(run(x, bias), by_token(x) @ weight.double().T + 1) < 2**-7


@pytest.mark.skipif(not HAS_AVX512, reason="this CPU has no AVX-512: INT4 is dequantized")
@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_int4_reads_16_bit_activations(tokens: int) -> None:
    weight, x = matrix("int4", 96, IN, 0), inputs(tokens)
    run = quantized_gemm(weight, torch.bfloat16)
    assert run is not None
    assert error(run(x, None), x.double() @ weight.double().T) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_merged_layer(kind: str, tokens: int) -> None:
    """Two factored shards, one of them in the pivot form, and a dense one."""
    downs = [matrix(kind, rank, IN, i) for i, rank in enumerate(RANKS)]
    ups = [matrix(kind, out, rank, 5 + i) for i, (out, rank) in enumerate(zip(OUTS, RANKS, strict=True))]
    dense, x = matrix(kind, 32, IN, 8), inputs(tokens)
    order = torch.randperm(OUTS[1] + RANKS[1], generator=torch.Generator().manual_seed(3))
    places = torch.cat([torch.arange(OUTS[1]), -1 - torch.arange(RANKS[1])])[order]
    shards = [Shard(downs[0], ups[0]), Shard(downs[1], ups[1], places), Shard(dense)]
    y = FactoredGemms(shards, dtype=torch.bfloat16)(x)
    halves = FactoredGemms(shards, dtype=torch.bfloat16, activation=lambda whole: whole[:, ::2])(x)
    assert torch.equal(halves, y[:, ::2])
    z = x.double() @ downs[1].double().T
    pivot = torch.cat([z @ ups[1].double().T, z], dim=1)
    columns = torch.where(places < 0, OUTS[1] - 1 - places, places)
    expected = torch.cat(
        [x.double() @ (ups[0].double() @ downs[0].double()).T, pivot[:, columns], x.double() @ dense.double().T], dim=1
    )
    assert y.shape == expected.shape
    assert error(y, expected) < 0.02


def test_matrices_of_one_kind_become_one() -> None:
    parts = [matrix("int8", 8, IN, 0), matrix("int8", 8, IN, 1), matrix("int4", 8, IN, 2), torch.ones(8, IN)]
    found = stacked(parts)
    assert [len(part) for part in found] == [16, 8, 8]
    assert torch.equal(torch.cat([part.double() for part in found]), torch.cat([part.double() for part in parts]))


@pytest.mark.parametrize("tokens", [1, 70])
def test_a_merged_layer_with_one_shard_that_is_not_quantized(tokens: int) -> None:
    down, up, dense, x = matrix("int8", 64, IN, 0), matrix("int8", 96, 64, 1), inputs(32, IN), inputs(tokens)
    for shards in ([Shard(down, up), Shard(dense)], [Shard(dense), Shard(down)]):
        chain = [s.down.double() if s.up is None else up.double() @ down.double() for s in shards]
        expected = x.double() @ torch.cat(chain).T
        bias = torch.ones(len(expected[0]), dtype=torch.bfloat16)
        gemms = FactoredGemms(shards, dtype=torch.bfloat16)
        assert error(gemms(x), expected) < 0.02
        assert error(gemms(x, bias), expected + 1) < 0.02


def test_no_tokens() -> None:
    shards = [Shard(matrix("int8", 64, IN, 0), matrix("int8", 96, 64, 1))]
    assert FactoredGemms(shards, dtype=torch.bfloat16)(inputs(0)).shape == (0, 96)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_reload_replaces_the_weights(kind: str) -> None:
    first, second = ([Shard(matrix(kind, 64, IN, s), matrix(kind, 96, 64, s + 1))] for s in (0, 20))
    x = inputs(5)
    gemms, fresh = FactoredGemms(first, dtype=torch.bfloat16), FactoredGemms(second, dtype=torch.bfloat16)
    expected = fresh(x).clone()
    assert not torch.equal(gemms(x), expected)
    gemms.refill(fresh)
    # What the new weights hold must stay, also where the other layer's memory is used again.
    del fresh
    gc.collect()
    used_again = [torch.full((size, 1), torch.nan) for size in (64, 96) for _ in range(50)]
    assert torch.equal(gemms(x), expected)
    del used_again
