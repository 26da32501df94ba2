"""Where to compute, and in which dtype."""

import torch

from pgsvd_vllm.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one.

    Raises:
        InputError: no such device, or one without float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"`device` {name}: cannot be used ({reason})") from None
    return device


def gemm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in where `dtype` is stored: float32 on processors without instructions for it.

    Emulated, products take ten times as long as in float32 and longer.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    able = torch.cpu.get_capabilities()
    has = dtype == torch.bfloat16 and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype if has else torch.float32
