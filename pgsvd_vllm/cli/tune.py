"""Find the fastest tiles of the Triton kernels for a checkpoint's layers on this GPU.

`vllm serve` reads the table from the user's cache, or from the file named by PGSVD_KERNEL_TABLE.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pgsvd_vllm.cli.model_arguments import add_checkpoint, checkpoint_folder
from pgsvd_vllm.errors import InputError, reason_of

if TYPE_CHECKING:
    from pgsvd_vllm.kernels.layer_shape import LayerShape
    from pgsvd_vllm.kernels.tile_table import Table
    from pgsvd_vllm.parallel.layer_grouping import LayerSizes

# Layers whose sizes differ by less than this factor are tuned once.
SAME = 1.1

EXAMPLES = (
    "tune DIR",
    "tune DIR -tp 2 --dry-run",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_checkpoint(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file to create or extend (default: a file in the user's cache, named after the GPU)",
    )
    parser.add_argument(
        "-tp",
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel size the model will be served with (default 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the layers that would be tuned; needs no GPU")


def run(arguments: argparse.Namespace) -> int:
    """Tune the layers and write the table; returns the exit status and raises PgsvdError."""
    tp_size = arguments.tensor_parallel_size
    if tp_size < 1:
        raise InputError(f"--tensor-parallel-size {tp_size}: must be 1 or more")
    from pgsvd_vllm.format.reader import open_checkpoint
    from pgsvd_vllm.kernels.layer_shape import layer_shape_of
    from pgsvd_vllm.parallel.layer_grouping import grouped_layers

    layers = list(grouped_layers(open_checkpoint(checkpoint_folder(arguments)), tp_size))
    kinds: dict[LayerShape, LayerSizes] = {}
    for layer in layers:
        sizes = layer_shape_of(layer.shards, layer.columns)
        if all(sizes.distance(other) > SAME for other in kinds):
            kinds[sizes] = layer
    print(f"{len(layers)} layers with low-rank projections, {len(kinds)} of different sizes")
    if not arguments.dry_run:
        return _tune(kinds, arguments.output)
    for sizes in kinds:
        print(f"  {_described(sizes)}")
    return 0


def _described(sizes: "LayerShape") -> str:
    """The sizes of a layer in words."""
    up = f", {sizes.heights} outputs of rank {sizes.rank}" if sizes.heights else ""
    return f"{sizes.columns} inputs, {sizes.rows} rows of the down GEMM{up}"


def _tune(kinds: "dict[LayerShape, LayerSizes]", output: Path | None) -> int:
    """Tune every kind of layer and write each result immediately; returns 1 if a tile computes a wrong result."""
    try:
        import torch

        from pgsvd_vllm.kernels.autotune import TOKENS, LayerTuner, merged
        from pgsvd_vllm.kernels.launch import can_overlap
        from pgsvd_vllm.kernels.tile_table import default_path, write_table
    except ImportError as error:
        raise InputError(f"tune: needs Triton: pip install triton ({error})") from None
    if not torch.cuda.is_available():
        raise InputError("tune: torch finds no GPU on this machine; --dry-run needs none")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path = output or default_path(name)
    table = _table(path, name)
    print(f"{name}; microseconds for the default tiles, the best tiles and cuBLAS")
    wrong: list[str] = []
    for number, (sizes, layer) in enumerate(kinds.items(), 1):
        begun = time.monotonic()
        try:
            tuner = LayerTuner(layer.shards, layer.columns, torch.bfloat16, device, can_overlap(device))
            found = [tuner.step(tokens) for tokens in TOKENS]
        except ValueError as error:
            raise InputError(f"tune: {_described(sizes)}: {error}") from None
        except torch.OutOfMemoryError as error:
            raise InputError(f"tune: {_described(sizes)}: {reason_of(error)}") from None
        table.layers[tuner.sizes] = merged([one.step for one in found])
        try:
            write_table(table, path)
        except OSError as error:
            raise InputError(f"--output {path}: cannot be written ({error.strerror})") from None
        print(f"[{number}/{len(kinds)}] {_described(sizes)}: {time.monotonic() - begun:.0f} s")
        for one in found:
            times = f"{1e6 * one.default:7.1f} {1e6 * one.best:7.1f} {1e6 * one.library:7.1f}"
            refused = f"  ({one.refused} tiles do not fit this GPU)" if one.refused else ""
            print(f"    {one.step.most_tokens:4} tokens {times}{refused}", flush=True)
            wrong += one.wrong
    print(f"wrote {path}: {len(table.layers)} layers")
    for text in wrong:
        print(f"pgsvd-vllm: a tile computed a wrong result and is not used; please report: {text}", file=sys.stderr)
    return 1 if wrong else 0


def _table(path: Path, device: str) -> "Table":
    """The table to extend: the file's contents, or an empty table."""
    from pgsvd_vllm.kernels.tile_table import Table, read_table

    if not os.path.exists(path):
        return Table(device)
    try:
        table = read_table(path)
    except ValueError as error:
        raise InputError(f"--output {error}; or name another file") from None
    if table.device != device:
        raise InputError(f"--output {path}: belongs to another GPU, {table.device}; name another file")
    return table
