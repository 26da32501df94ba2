"""Chooses the device that computes and the dtype of its GEMMs."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from pgsvd_vllm.errors import InputError, reason_of


def pick_device(name: str) -> torch.device:
    """The device of a name such as `cpu` or `cuda:1`; `auto` is a GPU if torch sees one, else the CPU.

    Raises:
        InputError: there is no such device, or it has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"`device` {name}: cannot be used ({reason_of(error)})") from None
    return device


def gemm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which GEMMs on stored weights run.

    CPUs without instructions for bfloat16 or float16 emulate them, which takes at least ten times as long as float32.
    Intel's AVX512-BF16 without AMX is half as fast as its float32 (docs/dev/log.md); AMD's is faster than float32.

    Args:
        device: that computes.
        dtype: of the stored weights.

    Returns:
        `dtype`, or float32 on a CPU where it is faster.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype == torch.bfloat16 and has_fast_bfloat16(torch.cpu.get_capabilities()) else torch.float32


def has_fast_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether GEMMs in bfloat16 are faster than in float32 on a CPU with these `torch.cpu.get_capabilities()`."""
    if capabilities.get("avx512_bf16") and not str(capabilities.get("cpu_name", "")).startswith("Intel"):
        return True
    return bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """The measured rate of square GEMMs, in floating-point operations per second."""
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        result = a @ a
    result.sum().item()
    return 3 * 2 * size**3 / (time.perf_counter() - start)
