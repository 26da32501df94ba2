"""The dtype in which a CPU computes."""

import pytest
import torch

from pgsvd_vllm.offline.model.device import gemm_dtype, has_fast_bfloat16


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


def test_float16_is_computed_in_float32_on_a_cpu() -> None:
    assert gemm_dtype(torch.device("cpu"), torch.float16) == torch.float32
