"""The dtypes of safetensors files: their sizes, and which of their values are numbers.

torch lacks some of these dtypes, and `torch.isfinite` lacks others or is wrong about them.
"""

import torch

from pgsvd_vllm.errors import CheckpointError

# Bits of one element.
DTYPE_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_WIDE_FLOATS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    "C64": torch.float32,  # real and imaginary parts
}
# Bits to look at in a byte, and the least value of them that is NaN or infinity. F4 and F6 have neither.
_NARROW_FLOATS = {
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E5M2": (0x7F, 0x7C),
    "F8_E8M0": (0xFF, 0xFF),
}
# Their one NaN is what would be a negative zero.
_NEGATIVE_ZERO_IS_NAN = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")
_NARROW_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


def stored_bytes(dtype: str, numel: int) -> int:
    """Bytes of a stored tensor.

    Args:
        dtype: as safetensors names it.
        numel: number of elements.
    """
    return numel * DTYPE_BITS[dtype] // 8


def bytes_are_finite(data: torch.Tensor, dtype: str) -> bool:
    """Whether stored elements hold neither NaN nor infinity.

    Args:
        data: uint8 [bytes], a whole number of elements.
        dtype: as safetensors names it.
    """
    if dtype in _WIDE_FLOATS:
        return is_finite(data.view(_WIDE_FLOATS[dtype]))
    if dtype in _NEGATIVE_ZERO_IS_NAN:
        return not bool((data == 0x80).any())
    mask, least = _NARROW_FLOATS.get(dtype, (0, 1))
    return not mask or not bool(((data & mask) >= least).any())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape, dtype and device holds neither NaN nor infinity; no copy is made of it."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype in _NARROW_NAMES:
        return bytes_are_finite(tensor.view(torch.uint8), _NARROW_NAMES[tensor.dtype])
    if tensor.is_complex():
        return is_finite(torch.view_as_real(tensor))
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        return True
    # Ten times as fast as isfinite on CPU; NaN propagates.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Check a loaded tensor; raises CheckpointError, naming it, if it holds NaN or infinity."""
    if not is_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity in {dtype}: the checkpoint is damaged (pgsvd-vllm verify DIR), or "
            f"its numbers are too large for {dtype}"
        )
