"""Triton's interpreter, mended for bf16, watching every address, running programs in any order.

Import before any kernel, with TRITON_INTERPRET=1 set before triton is imported. Triton keeps bf16 as uint16
there: products multiply those integers, and casts to bf16 cut off instead of rounding. Addresses are checked
against the launch's tensors, because a load beyond them is not seen otherwise; no address may be stored twice
in one launch, because the interpreter runs programs one after the other and hides what would be a race. A
launch that may overlap the one before must wait before it touches what that one makes.
"""

import random
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _mend_casts() -> None:
    def mended(original: Any) -> Any:
        def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            pair = source.dtype.scalar, target.scalar
            if pair == (tl.bfloat16, tl.float32):
                return Handle(_widen(source.data), tl.float32)
            if pair == (tl.float32, tl.bfloat16):
                return Handle(_round(source.data), tl.bfloat16)
            if pair[0] == tl.float8e4nv:
                exact = torch.from_numpy(source.data).view(torch.float8_e4m3fn).float().numpy()
                return cast(self, Handle(exact, tl.float32), target, *rest)
            if pair == (tl.int8, tl.bfloat16):
                return Handle(_round(source.data.astype(np.float32)), tl.bfloat16)
            return original(self, source, target, *rest)

        return cast

    for name in ("cast_impl", "create_fp_to_fp", "create_fp_trunc", "create_fp_ext", "create_si_to_fp"):
        setattr(Builder, name, mended(getattr(Builder, name)))


def _mend_dot() -> None:
    original = Builder.create_dot

    def single(operand: Any) -> Any:
        """An operand in float32, where every product of two halves is exact."""
        if operand.dtype.scalar == tl.bfloat16:
            return Handle(_widen(operand.data), tl.float32)
        return Handle(operand.data.astype(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, single(a), single(b), *rest)

    Builder.create_dot = dot


# Arguments that the launch before, or one before that, may still read or write.
MADE = ("x", "z", "s", "y", "partials", "counters")
Region = tuple[int, int]


def _within(used: np.ndarray, regions: list[Region]) -> np.ndarray:
    inside = np.zeros(used.shape, bool)
    for low, high in regions:
        inside |= (used >= low) & (used < high)
    return inside


class Watch:
    """The addresses of a launch.

    Attributes:
        launches: how many there have been.
        waited: whether this program has waited for the launch before, or need not.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.waited = True
        self.regions: dict[str, Region] = {}
        self.stored: set[int] = set()
        self.overlaps = False

    def begin(self, arguments: dict[str, Any]) -> None:
        self.launches += 1
        self.regions = {}
        self.stored = set()
        self.overlaps = bool(arguments.get("PDL"))
        for name, tensor in arguments.items():
            if hasattr(tensor, "data_ptr") and tensor.numel():
                reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                self.regions[name] = tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()

    def program(self) -> None:
        self.waited = not self.overlaps

    def wait(self) -> None:
        self.waited = True

    def check(self, pointers: Any, mask: Any, what: str) -> np.ndarray:
        used = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))].ravel()
        inside = _within(used, list(self.regions.values()))
        if not inside.all():
            raise IndexError(f"{what}: {int((~inside).sum())} of {used.size} addresses are in no tensor of the launch")
        made = [region for name, region in self.regions.items() if name in MADE]
        if not self.waited and _within(used, made).any():
            raise IndexError(f"{what} of what the launch before makes, before it has ended")
        return used

    def store(self, pointers: Any, mask: Any) -> None:
        used = self.check(pointers, mask, "store").tolist()
        if len(set(used)) < len(used) or not self.stored.isdisjoint(used):
            raise IndexError("an address is stored twice in one launch")
        self.stored.update(used)


watch = Watch()


def _watch_addresses() -> None:
    arguments = interpreter.GridExecutor._init_args_hst
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def begin(self: Any, positional: Any, named: Any) -> Any:
        found = arguments(self, positional, named)
        watch.begin(dict(zip(self.arg_names, found[0], strict=False)) | found[1])
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.check(pointers, mask, "atomic")
        return atomic(self, kind, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = begin
    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
    Builder.create_atomic_rmw = checked_atomic


def _shuffle(seed: int) -> None:
    """Programs run in an order of chance: no result may depend on it."""
    builder, rng = interpreter.interpreter_builder, random.Random(seed)
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []

    def dim(nx: int, ny: int, nz: int) -> None:
        order[:] = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        rng.shuffle(order)
        set_dim(nx, ny, nz)

    def index(*_own: int) -> None:
        set_index(*order.pop())
        watch.program()

    builder.set_grid_dim, builder.set_grid_idx = dim, index


def prepare(seed: int) -> None:
    """Mend and watch the interpreter of this process."""
    _mend_casts()
    _mend_dot()
    _watch_addresses()
    _shuffle(seed)
    cuda.gdc_wait, cuda.gdc_launch_dependents = watch.wait, lambda: None
