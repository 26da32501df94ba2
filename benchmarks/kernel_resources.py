"""What the Triton kernels' machine code needs, for GPUs that need not be there.

    python benchmarks/kernel_resources.py [--quick] [--targets sm_80 gfx942 ...] [--json FILE]

Every tile that the launcher chooses, compiled ahead of time. The bars: no spilled registers, products in tensor
core instructions, weights loaded 16 bytes at a time, shared memory that the device has. The exit status is 1
where one is missed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pgsvd_vllm.kernels.down import down_kernel
from pgsvd_vllm.kernels.tiles import Tile, down_tile, for_amd, up_tile
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
HALF = "*bf16"
TYPES = dict.fromkeys(("x", "v", "z", "u", "y", "bias"), HALF) | {
    "places": "*i32",
    "partials": "*fp32",
    "counters": "*i32",
}
# Arguments that are no multiples of 16: all others are, as the launcher makes them.
UNALIGNED = {"tokens", "n0", "n1", "n2", "y0", "y1", "y2"}
# Llama-2-7B's merged QKV at 40 % removed.
ROWS, COLUMNS = 3696, 4096
TOKENS = (1, 17, 65)

Row = dict[str, Any]


def cases(targets: list[str], quick: bool) -> Iterator[tuple[str, str, Any, Tile, dict[str, Any]]]:
    """(name, target, kernel, tile, constants) of every kernel there is."""
    for target in targets:
        overlaps = [False, True] if target in ("sm_90", "sm_100") else [False]
        for tokens in TOKENS:
            for pdl in overlaps:
                down, up = down_tile(tokens, ROWS, COLUMNS), up_tile(tokens)
                if target.startswith("gfx"):
                    down, up = for_amd(down), for_amd(up)
                after = ", PDL" if pdl else ""
                for places in [True] if quick else [False, True]:
                    constants = {"HAS_PLACES": places, "HAS_BIAS": places, "PDL": pdl}
                    full = " with places and bias" if places else ""
                    name = f"down, {tokens} tokens{full}{after}"
                    own = {"BLOCK_R": down.block_out, "SPLIT_K": down.split_k, "EVEN_K": True, "SWAP": down.swap}
                    yield name, target, down_kernel, down, own | constants
                    for shards in [1, 3]:
                        name = f"up, {tokens} tokens, {shards} shard{'s'[: shards - 1]}{full}{after}"
                        own = {"BLOCK_N": up.block_out, "SHARDS": shards, "SWAP": up.swap}
                        yield name, target, up_kernel, up, own | constants


def resources(name: str, target: str, kernel: Any, tile: Tile, constants: dict[str, Any]) -> Row:
    """One compiled kernel's figures."""
    constants = constants | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    types = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and n not in UNALIGNED
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if constants["PDL"]:
        options["launch_pdl"] = True
    device, most_shared = TARGETS[target]
    built = triton.compile(source, target=device, options=options)
    row: Row = {"case": f"{target} {name}", "shared": built.metadata.shared, "warps": tile.warps}
    row |= _nvidia(built.asm) if device.backend == "cuda" else _amd(built.asm["amdgcn"])
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


def _nvidia(built: dict[str, Any]) -> Row:
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
        "tensor": sum("MMA" in name for name in called),
        "copy_bytes": min(copies, default=0),
    }


def _amd(code: str) -> Row:
    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    # The narrow loads that remain are of places and bias, one number a lane.
    wide = re.search(r"(global|buffer)_load_(dwordx4|lds_dwordx4)", code)
    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "tensor": len(re.findall(r"v_mfma", code)),
        "copy_bytes": 16 if wide else 4,
    }


def main() -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="What the Triton kernels' machine code needs, without a GPU.")
    parser.add_argument("--quick", action="store_true", help="the kernels with every feature alone")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    print(f"triton {triton.__version__}\n{'':54} registers spills shared KB tensor copy bytes")
    for case in cases(arguments.targets, arguments.quick):
        row = resources(*case)
        rows.append(row)
        print(
            f"{row['case']:54} {row['registers']:9} {row['spills']:6} {row['shared'] / 1024:9.0f} {row['tensor']:6} "
            f"{row['copy_bytes']:10} {', '.join(row['missed'])}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} kernels, {missed} beyond a bar")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
