"""The dtype in which a CPU computes."""

import pytest
import torch

from pgsvd_vllm.offline.model.device import gemm_dtype, gemm_rate, has_fast_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"cpu_name": "Neoverse V1", "bf16": True}, True),
        ({}, False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster_than_float32(capabilities: dict[str, object], fast: bool) -> None:
    assert has_fast_bfloat16(capabilities) is fast


def test_the_chosen_dtype_is_not_much_slower_than_float32_here() -> None:
    cpu = torch.device("cpu")
    chosen = gemm_dtype(cpu, torch.bfloat16)
    rates = [max(gemm_rate(dtype, cpu) for _ in range(3)) for dtype in (chosen, torch.float32)]
    assert rates[0] > 0.7 * rates[1]


def test_float16_is_computed_in_float32_on_a_cpu() -> None:
    assert gemm_dtype(torch.device("cpu"), torch.float16) == torch.float32
