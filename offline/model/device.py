"""Chooses the device that computes and the dtype of its GEMMs."""

import time

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

    Args:
        device: that computes.
        dtype: of the stored weights.

    Returns:
        `dtype`, or float32 on a CPU that would emulate it.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    capabilities = torch.cpu.get_capabilities()
    is_native = dtype == torch.bfloat16 and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype if is_native else torch.float32


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """The measured rate of square GEMMs, in floating-point operations per second."""
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        result = a @ a
    result.sum().item()
    return 3 * 2 * size**3 / (time.perf_counter() - start)
