"""Registers, spills and shared memory of the Triton kernels' machine code, without a GPU.

    python benchmarks/kernel_resources.py [--quick | --candidates] [--targets sm_80 gfx942 ...] [--json FILE]

It compiles every default tile of the launcher ahead of time, or every further tile that tuning tries. The bars: no
spilled registers, GEMMs in tensor core instructions, weights loaded 16 bytes at a time, and no more shared memory than
the device has. The exit status is 1 if one is missed.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import write_rows
from pgsvd_vllm.kernels.autotune import TOKENS as TUNED_TOKENS
from pgsvd_vllm.kernels.autotune import candidates
from pgsvd_vllm.kernels.down import down_kernel
from pgsvd_vllm.kernels.gated import gated_kernel
from pgsvd_vllm.kernels.layer_shape import LayerShape
from pgsvd_vllm.kernels.tile_heuristics import Tile, own_tiles
from pgsvd_vllm.kernels.up import up_kernel

# Shared memory that one program may have, bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = ("bf16", "fp16")
# Weights of 8 bits, and the targets where the kernels read them.
EIGHT_BITS = {"i8": tuple(TARGETS), "fp8e4nv": ("sm_89", "sm_90", "sm_100")}
# Of these, the one that the quick run takes for each target.
QUICK_BITS = {"sm_80": "i8", "sm_90": "fp8e4nv"}
TYPES = {"places": "*i32", "own": "*i32", "counters": "*i32"}
TYPES |= {"partials": "*fp32", "v_scale": "*fp32", "u_scale": "*fp32"}
NUMBERS = ("x", "s", "z", "y", "bias")
WEIGHTS = ("v", "u")
# Llama-2-7B's merged QKV at 40 % removed.
SIZES = LayerShape(4096, 3696, 3 * 4096, 1232, 3, False)
# Its output projection at 40 % in the pivot form.
SMALL = LayerShape(4096, 1504, 2592, 1504, 1, True)
TOKENS = (1, 17, 33, 65)

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kernel for one GPU."""

    name: str
    target: str
    kernel: Any
    tile: Tile
    constants: dict[str, Any]
    dtype: str = DTYPES[0]
    weights: str = ""  # one of EIGHT_BITS; otherwise they have that dtype


def _features(full: bool, pdl: bool) -> tuple[dict[str, Any], str]:
    """Constants of a kernel with or without pivot positions and bias, and the name's ending."""
    constants = {"HAS_PLACES": full, "HAS_BIAS": full, "PDL": pdl}
    return constants, (" with places and bias" if full else "") + (", PDL" if pdl else "")


def down_case(name: str, target: str, tile: Tile, pdl: bool) -> Case:
    """A down kernel."""
    constants = {"BLOCK_R": tile.block_out, "SPLIT_K": tile.split_k, "EVEN_K": True, "SWAP": tile.swap, "PDL": pdl}
    return Case(f"down, {name}" + (", PDL" if pdl else ""), target, down_kernel, tile, constants)


def up_case(name: str, target: str, tile: Tile, shards: int, full: bool, pdl: bool) -> Case:
    """An up kernel."""
    constants, after = _features(full, pdl)
    own = {"BLOCK_N": tile.block_out, "SHARDS": shards, "SWAP": tile.swap, "HAS_OWN": full}
    label = f"up, {name}, {shards} shard{'s'[: shards - 1]}{after}"
    return Case(label, target, up_kernel, tile, own | constants)


def gated_case(name: str, target: str, tile: Tile, full: bool, pdl: bool) -> Case:
    """An up kernel with the activation."""
    constants, after = _features(full, pdl)
    own = {"BLOCK_N": tile.block_out, "SWAP": tile.swap}
    return Case(f"gated, {name}{after}", target, gated_kernel, tile, own | constants)


def overlaps(target: str) -> list[bool]:
    """Without and, if the device has it, with programmatic dependent launch."""
    return [False, True] if target in ("sm_90", "sm_100") else [False]


def usual_cases(targets: list[str], quick: bool) -> Iterator[Case]:
    """Every kernel with default tiles; if `quick`, the kernels with every feature, in bf16 alone."""
    for target in targets:
        for tokens, pdl in itertools.product(TOKENS, overlaps(target)):
            down, up, small, gated = _tiles(target, tokens)
            for full, dtype in [(True, DTYPES[0])] if quick else itertools.product((False, True), DTYPES):
                name = f"{tokens} tokens" + ("" if dtype == DTYPES[0] else f", {dtype}")
                if down is not None and full:
                    yield replace(down_case(name, target, down, pdl), dtype=dtype)
                for shards in (1, 3):
                    yield replace(up_case(name, target, up, shards, full, pdl), dtype=dtype)
                if small != up:
                    yield replace(up_case(f"{name}, few rows", target, small, 1, full, pdl), dtype=dtype)
                if down is not None:
                    yield replace(gated_case(name, target, gated, full, pdl), dtype=dtype)


def _tiles(target: str, tokens: int, bits: int = 16) -> tuple[Tile | None, Tile, Tile, Tile]:
    """The default tiles of the down, the up, the small up and the gated kernel."""
    amd = target.startswith("gfx")
    sizes, small = replace(SIZES, bits=bits), replace(SMALL, bits=bits)
    down, up = own_tiles(tokens, sizes, amd=amd)
    return down, up, own_tiles(tokens, small, amd=amd)[1], own_tiles(tokens, sizes, gated=True, amd=amd)[1]


def eight_bit_cases(targets: list[str], quick: bool) -> Iterator[Case]:
    """The kernels with weights of 8 bits and every feature; if `quick`, on the targets of QUICK_BITS alone."""
    for target in targets:
        for weights, places in EIGHT_BITS.items():
            if target not in places or (quick and QUICK_BITS.get(target) != weights):
                continue
            for tokens in TOKENS:
                down, up, small, gated = _tiles(target, tokens, 8)
                if down is None:  # CUTLASS computes the layer
                    continue
                pdl, name = overlaps(target)[-1], f"{tokens} tokens, {weights}"
                cases = [down_case(name, target, down, pdl), gated_case(name, target, gated, True, pdl)]
                cases += [up_case(name, target, up, shards, True, pdl) for shards in (1, 3)]
                if small != up:
                    cases.append(up_case(f"{name}, few rows", target, small, 1, True, pdl))
                yield from (replace(case, weights=weights) for case in cases)


def candidate_cases(targets: list[str]) -> Iterator[Case]:
    """Every further tile that tuning tries, once, with every feature."""
    for target in targets:
        amd = target.startswith("gfx")
        tried: dict[str, dict[Tile, None]] = {"down": {}, "up": {}}
        for tokens in TUNED_TOKENS:
            downs, ups = candidates(tokens, own_tiles(tokens, SIZES, amd=amd), amd)
            tried["down"] |= dict.fromkeys(downs)
            tried["up"] |= dict.fromkeys(ups)
        for kind, tile in ((kind, tile) for kind, tiles in tried.items() for tile in tiles):
            blocks = f"{tile.block_m}x{tile.block_out}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages"
            pdl = overlaps(target)[-1]
            if kind == "down":
                yield down_case(f"{blocks}, {tile.split_k} parts", target, tile, pdl)
            else:
                yield up_case(blocks, target, tile, 3, True, pdl)


def resources(case: Case) -> Row:
    """One compiled kernel's figures."""
    kernel, tile, target = case.kernel, case.tile, case.target
    constants = case.constants | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "SCALED": bool(case.weights)}
    numbers = dict.fromkeys(NUMBERS, f"*{case.dtype}") | dict.fromkeys(WEIGHTS, f"*{case.weights or case.dtype}")
    types = {n: "constexpr" if n in constants else (numbers | TYPES).get(n, "i32") for n in kernel.arg_names}
    # The others are multiples of 16 in most layers.
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if parameter.name not in constants and not parameter.do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if constants["PDL"]:
        options["launch_pdl"] = True
    device, most_shared = TARGETS[target]
    built = triton.compile(source, target=device, options=options)
    row: Row = {"case": f"{target} {case.name}", "shared": built.metadata.shared, "warps": tile.warps}
    row |= (
        nvidia_figures(built.asm)
        if device.backend == "cuda"
        else _amd(built.asm["amdgcn"], constants.get("HAS_PLACES", False))
    )
    missed = []
    if row["spills"]:
        missed.append(f"{row['spills']} spills")
    if not row["tensor"]:
        missed.append("no tensor core instructions")
    if row["copy_bytes"] < 16:
        missed.append(f"copies of {row['copy_bytes']} bytes")
    if row["shared"] > most_shared:
        missed.append(f"more than {most_shared >> 10} KB of shared memory")
    return row | {"value": row["registers"], "bar": None, "ok": not missed, "missed": missed}


def nvidia_figures(built: dict[str, Any]) -> Row:
    """Figures from the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(TOOLS / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("-sass")
    registers = re.search(r"REG:(\d+)", usage)
    # The instruction follows its address, and perhaps a predicate.
    called = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    copies = [16 if ".128" in name else 8 if ".64" in name else 4 for name in called if name.startswith("LDGSTS")]
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": sum(name.startswith(("LDL", "STL")) for name in called),
        # HFMA2.MMA is none of them.
        "tensor": sum(name.split(".")[0].endswith("MMA") for name in called),
        "copy_bytes": min(copies, default=0),
    }


def _amd(code: str, has_places: bool) -> Row:
    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    wide = re.search(r"(global|buffer)_load_(dwordx4|lds_dwordx4)", code)
    # Of places and bias each lane loads one number; nothing else may be loaded like that.
    narrow = not has_places and re.search(r"(global|buffer)_load_(dword|[us]?short\w*|ubyte\w*)\b", code)
    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "tensor": len(re.findall(r"v_mfma", code)),
        "copy_bytes": 16 if wide and not narrow else 4,
    }


def main() -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the kernels with every feature alone, in bf16")
    which.add_argument("--candidates", action="store_true", help="the tiles that pgsvd-vllm tune tries, instead")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    print(f"triton {triton.__version__}\n{'':54} registers spills shared KB tensor copy bytes")
    targets, quick = arguments.targets, arguments.quick
    cases = itertools.chain(usual_cases(targets, quick), eight_bit_cases(targets, quick))
    for case in candidate_cases(targets) if arguments.candidates else cases:
        row = resources(case)
        rows.append(row)
        print(
            f"{row['case']:54} {row['registers']:9} {row['spills']:6} {row['shared'] / 1024:9.0f} {row['tensor']:6} "
            f"{row['copy_bytes']:10} {', '.join(row['missed'])}",
            flush=True,
        )
    write_rows(arguments.json, rows)
    missed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} kernels, {missed} beyond a bar")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
