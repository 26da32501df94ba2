"""Machine code of other projects' Triton kernels for one token of a factored Llama-2-7B, beside ours at the same sizes.

    python benchmarks/studies/peer_kernels.py --flashsvd DIR --mem-efficient-blr DIR [--targets sm_80 sm_90]
        [--json FILE]

Each DIR is a checkout of that project's repository, from which the kernels are imported; either may be left out:

    https://github.com/Zishan-Shao/FlashSVD         a7d348303e531870b00c2b88d213e84086bf643f
    https://github.com/pabillam/mem-efficient-blr   d3e02c1741bdc824c5112b55472ca5f5ca300b6c

All kernels are bf16 with 40 % removed. A peer's tiles are those of its launcher for the rank; if it tunes over a list,
the entry with the fewest spilled registers among those that fit the device. It needs no GPU, and about ten minutes for
the lists. The bar: our kernels spill no more and a layer takes no more launches; a kernel that does not fit the device
has no launches. The exit status is 1 if a bar is missed.
"""

import argparse
import functools
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.gpu_check import LAYERS, rank_for
from benchmarks.kernel_resources import (
    TARGETS,
    Row,
    down_case,
    gated_case,
    nvidia_figures,
    overlaps,
    resources,
    up_case,
)
from benchmarks.rows import write_rows
from pgsvd_vllm.kernels.layer_shape import ShardShape, layer_shape_of
from pgsvd_vllm.kernels.tile_heuristics import own_tiles

REMOVED = 0.4
# The MLP is gate_up, with the activation, and down.
OUR_LAUNCHES = dict.fromkeys(LAYERS, 2) | {"mlp": 4}
# Tensors of FlashSVD that are not bf16.
FLOAT32 = {"S_ptr", "Y_ptr"}
Tiling = tuple[dict[str, int], int, int]  # constants, warps, stages


@dataclass(frozen=True)
class Peer:
    """A peer's kernel for one layer.

    Attributes:
        layer: one of OUR_LAUNCHES.
        name: for the table.
        kernel: the jitted function.
        sizes: its whole-number arguments.
        tilings: to choose from.
        programs: that one token starts; of every tiling the same.
        launches: of the whole layer, with those that are not Triton's.
    """

    layer: str
    name: str
    kernel: Any
    sizes: dict[str, int]
    tilings: list[Tiling]
    programs: int
    launches: int


def load(path: Path) -> ModuleType:
    """One file of a checkout, without the packages around it."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strides(prefix: str, **sizes: int) -> dict[str, int]:
    """The stride arguments of a tensor without gaps."""
    step, found = 1, {}
    for dimension, size in reversed(sizes.items()):
        found[prefix + dimension] = step
        step *= size
    return found


def flashsvd(root: Path, target: str) -> Iterator[Peer]:
    """FlashSVD v1.5's decode kernels; its o projection is two cuBLAS GEMMs."""
    mlp = load(root / "kernels/mlp/decode/dual_split_triton.py")
    packed = load(root / "kernels/mlp/decode/dual_split_triton_pcat_s.py")
    attention = load(root / "kernels/attn/decode/densekv_reconstruct_triton.py")
    flags = {"USE_BF16": 1, "USE_FP32": 0}

    (out, _, _), columns = LAYERS["qkv"]
    rank = rank_for(out, columns, REMOVED)
    heads = 32
    sizes = {"B": 1, "H": heads, "Hk": heads, "Dh": out // heads, "R": rank}
    for name in "qkv":
        sizes |= strides(f"sP{name}_", b=1, r=rank) | strides(f"sV{name}_", h=heads, r=rank, d=out // heads)
        sizes |= strides(f"s{name.upper()}_", b=1, h=heads, d=out // heads) | {f"sb{name}_h": 0, f"sb{name}_d": 0}
    # As benchmark/attn/decode_compare.py chooses them for a rank of 512 and more.
    constants = {"BD": 128, "BR": 128, "HAS_BQ": 0, "HAS_BK": 0, "HAS_BV": 0} | flags
    kernel = attention._reconstruct_qkv_token_shared_kernel
    # One GEMM with the stacked down factors, and the kernel.
    yield Peer("qkv", "FlashSVD reconstruct", kernel, sizes, [(constants, 8, 2)], heads, 2)

    (inner, _), hidden = LAYERS["gate_up"]
    rank = rank_for(inner, hidden, REMOVED)
    # One launch for the stacked down factors of gate and up, one for the kernel. Then v1 adds its parts; the others
    # have zeroed what they add to, and round it; all but v3 include the GEMM with the last factor.
    kernels = (
        (mlp._dual_split_phase1_partials_token, mlp._pick_dual_split_token_config(rank, inner)),
        (mlp._dual_split_phase1_atomic_token, mlp._pick_dual_split_token_v2_config(rank, inner)),
        (
            mlp._dual_split_phase1_atomic_token_gd2,
            mlp._pick_dual_split_token_v2_sm80_config(rank, inner, is_sm80=target == "sm_80"),
        ),
        (mlp._dual_split_phase1_to_y_atomic_token, mlp._pick_dual_split_token_v3_config(rank, inner, hidden)),
        (packed._dual_split_pcat_to_s_atomic_token, packed._pick_dual_split_pcat_s_config(rank, inner)),
    )
    counted = {"v1": 4, "v2": 5, "v2_sm80": 5, "v3": 4, "pcat_s": 5}
    for (kernel, chosen), (name, launches) in zip(kernels, counted.items(), strict=True):
        blocks = triton.cdiv(inner, chosen["BD"])
        sizes = {"T": 1, "D": inner, "R": rank, "H": hidden, "ND": blocks}
        sizes |= strides("sPUp_", t=1, r=rank) | strides("sPGate_", t=1, r=rank) | strides("sPCat_", t=1, r=2 * rank)
        sizes |= strides("sGate_", r=rank, d=inner) | strides("sUp_", r=rank, d=inner)
        sizes |= strides("sDownV_", d=inner, r=rank) | strides("sDownU_", r=rank, h=hidden)
        sizes |= strides("sWork_", t=1, n=blocks, r=rank) | strides("sS_", t=1, r=rank) | strides("sY_", t=1, h=hidden)
        constants = {key: value for key, value in chosen.items() if key in kernel.arg_names} | flags
        programs = triton.cdiv(blocks, chosen.get("GD", 1)) * chosen.get("GH", 1)
        tiling = constants, chosen["warps"], chosen["stages"]
        yield Peer("mlp", f"FlashSVD {name}", kernel, sizes, [tiling], programs, launches)


def mem_efficient_blr(root: Path) -> Iterator[Peer]:
    """mem-efficient-blr's low-rank kernel: both GEMMs of a projection in one launch."""
    # The file imports one function of its repository's utils, which import much else.
    utils = sys.modules["utils"] = ModuleType("utils")
    vars(utils)["next_power_of_2"] = triton.next_power_of_2
    tuned = load(root / "triton_funcs/low_rank_kernels.py")._triton_low_rank_kernel_fp16
    del sys.modules["utils"]
    for layer, (outs, columns) in LAYERS.items():
        out, rank = outs[0], rank_for(outs[0], columns, REMOVED)
        sizes = {"N": 1, "O": out, "I": columns, "R": rank}
        sizes |= strides("stride_x", n=1, i=columns) | strides("stride_a", i=columns, r=rank)
        sizes |= strides("stride_b", r=rank, o=out) | strides("stride_y", n=1, o=out)
        whole = {"BLOCK_SIZE_R": triton.next_power_of_2(rank)}
        tilings = [(config.kwargs | whole, config.num_warps, config.num_stages) for config in tuned.configs]
        yield Peer(layer, "mem-efficient-blr", tuned.fn, sizes, tilings, 1, len(outs))


@functools.cache
def compiled(
    kernel: Any,
    types: tuple[str, ...],
    constants: tuple[tuple[str, int], ...],
    aligned: tuple[int, ...],
    warps: int,
    stages: int,
    target: str,
) -> Row:
    """One kernel's figures, once for all sizes that it is the same for."""
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    try:
        built = triton.compile(source, target=TARGETS[target][0], options={"num_warps": warps, "num_stages": stages})
    except Exception as error:  # whatever part of the compiler refuses
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"shared": built.metadata.shared} | nvidia_figures(built.asm)


def best(peer: Peer, target: str) -> Row:
    """The figures of the peer's best tiling."""
    found = []
    for tiles, warps, stages in peer.tilings:
        # Triton makes a constant of every 1, and one kernel of all sizes that are multiples of 16.
        constants = {name: peer.sizes[name] for name in peer.kernel.arg_names if peer.sizes.get(name) == 1} | tiles
        types, aligned = [], []
        for i, name in enumerate(peer.kernel.arg_names):
            pointer = "*fp32" if name in FLOAT32 else "*bf16"
            types.append("constexpr" if name in constants else "i32" if name in peer.sizes else pointer)
            if name not in constants and peer.sizes.get(name, 0) % 16 == 0:
                aligned.append(i)
        fixed = tuple(constants.items())
        figures = compiled(peer.kernel, tuple(types), fixed, tuple(aligned), warps, stages, target)
        blocks = " ".join(f"{name.removeprefix('BLOCK_SIZE_')} {size}" for name, size in tiles.items() if size > 1)
        found.append(figures | {"tiles": f"{blocks}, {warps} warps, {stages} stages"})
    fitting = TARGETS[target][1]
    return min(found, key=lambda row: ("refused" in row, row.get("shared", 0) > fitting, row.get("spills", 0)))


def ours(target: str) -> Iterator[Row]:
    """Our kernels' figures."""
    pdl = overlaps(target)[-1]
    for layer, (outs, columns) in LAYERS.items():
        sizes = layer_shape_of([ShardShape(out, rank_for(out, columns, REMOVED)) for out in outs], columns)
        rows = sizes.rows
        down, up = own_tiles(1, sizes, gated=layer == "gate_up")
        assert down is not None
        programs = triton.cdiv(rows, down.block_out) * down.split_k, sum(triton.cdiv(n, up.block_out) for n in outs)
        above = up_case("", target, up, len(outs), False, pdl)
        if layer == "gate_up":
            programs = programs[0], triton.cdiv(outs[0], up.block_out)
            above = gated_case("", target, up, False, pdl)
        cases = down_case("", target, down, pdl), above
        for kind, case, started in zip(("down", "up"), cases, programs, strict=True):
            tile, row = case.tile, resources(case)
            split = f" in {tile.split_k} parts" if tile.split_k > 1 else ""
            tiles = f"{tile.block_m}x{tile.block_out}x{tile.block_k}{split}, {tile.warps} warps, {tile.stages} stages"
            fits = row["shared"] <= TARGETS[target][1]
            row |= {"case": f"{target} {layer}, ours, {kind}", "value": row["spills"], "bar": 0, "fits": fits}
            yield row | {"layer": layer, "tiles": tiles, "programs": started, "launches": OUR_LAUNCHES[layer]}


def beside(peer: Peer, target: str, own: list[Row]) -> Row:
    """A peer's figures, and whether ours are as good."""
    row: Row = {"case": f"{target} {peer.layer}, {peer.name}"} | best(peer, target)
    fits = "refused" not in row and row["shared"] <= TARGETS[target][1]
    layers = ("gate_up", "down") if peer.layer == "mlp" else (peer.layer,)
    spills = max(found["spills"] for found in own if found["layer"] in layers)
    launches = OUR_LAUNCHES[peer.layer]
    ok = ("spills" not in row or spills <= row["spills"]) and (launches <= peer.launches or not fits)
    row |= {"value": spills, "bar": row.get("spills"), "ok": ok, "fits": fits, "our_launches": launches}
    return row | {"layer": peer.layer, "programs": peer.programs, "launches": peer.launches}


def line(row: Row) -> str:
    """Of the table."""
    figures = f"{row.get('refused')} | | |"
    if "refused" not in row:
        over = "" if row["fits"] else " (does not fit)"
        figures = f"{row['registers']} | {row['spills']} | {row['shared'] / 1024:.0f}{over} | {row['tensor']} |"
    end = f"{row['programs']} | {row['launches']} | {'' if row['ok'] else 'MISSED'}"
    return f"| {row['case']} | {row['tiles']} | {figures} {end} |"


def main() -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Peers' low-rank Triton kernels beside ours, without a GPU.")
    parser.add_argument("--flashsvd", type=Path, metavar="DIR", help="a checkout of FlashSVD")
    parser.add_argument("--mem-efficient-blr", type=Path, metavar="DIR", help="a checkout of mem-efficient-blr")
    parser.add_argument("--targets", nargs="+", choices=("sm_80", "sm_90"), default=["sm_80", "sm_90"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, 1 token, {REMOVED:.0%} removed")
    print("| kernel | tiles | registers | spills | shared KB | tensor | programs | launches | |\n|" + "---|" * 9)
    rows = []
    for target in arguments.targets:
        peers = list(flashsvd(arguments.flashsvd, target)) if arguments.flashsvd else []
        peers += mem_efficient_blr(arguments.mem_efficient_blr) if arguments.mem_efficient_blr else []
        own = list(ours(target))
        for row in itertools.chain(own, (beside(peer, target, own) for peer in peers)):
            rows.append(row)
            print(line(row), flush=True)
            write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
