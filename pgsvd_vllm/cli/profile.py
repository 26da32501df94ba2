"""Measure dense and low-rank GEMM latency for a model's shapes on this CPU, or compute it for a GPU.

The table is for compress --objective latency. Measuring runs on the serving machine with vLLM installed; weight values
do not matter. Computing runs anywhere.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pgsvd_vllm.cli.model_arguments import add_model
from pgsvd_vllm.errors import InputError

if TYPE_CHECKING:
    from pgsvd_vllm.format.latency_table import LatencyTable
    from pgsvd_vllm.offline.model.projection import Projection

EXAMPLES = (
    "profile MODEL -o latencies.json",
    "profile MODEL -o latencies.json --gpu H100",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--tokens",
        type=int,
        default=1,
        metavar="N",
        help="tokens per GEMM: 1 for the latency of one request (default), more for a server with many requests",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="dtype the model will be served in (default bfloat16)",
    )
    parser.add_argument(
        "--gpu",
        choices=["H100", "H200"],
        help="compute the latencies of this GPU in CUDA graphs instead of measuring this machine; needs no GPU and no "
        "vLLM (docs/kernels.md: measured speed-ups within 15 %%)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Measure latencies and write the table; returns the exit status and raises PgsvdError."""
    if not 1 <= arguments.tokens <= 65536:
        raise InputError(f"--tokens {arguments.tokens}: must be a number of tokens from 1 to 65536")
    if arguments.gpu and arguments.dtype == "float32":
        raise InputError("--gpu: the kernels on GPUs are for bfloat16 and float16; choose one of them with --dtype")
    if not arguments.gpu:
        _import_kernels()
    from pgsvd_vllm.format.latency_table import write_latencies
    from pgsvd_vllm.offline.model.find_projections import find_projections
    from pgsvd_vllm.offline.model.hub import resolve_folder
    from pgsvd_vllm.offline.model.source import ModelSource

    if not arguments.output.resolve().parent.is_dir():
        raise InputError(f"--output {arguments.output}: cannot be written (no such folder)")
    if arguments.output.is_dir():
        raise InputError(f"--output {arguments.output}: is a folder; name a file to write")
    folder = resolve_folder(arguments.model, arguments.trust_remote_code, arguments.revision)
    source = ModelSource(folder, arguments.trust_remote_code)
    table = _table(arguments, find_projections(source).flat)
    try:
        write_latencies(table, arguments.output)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    tokens = f"{table.tokens} token" + ("s" if table.tokens > 1 else "")
    print(f"wrote {arguments.output}: {len(table.shapes)} shapes, {tokens}, {table.dtype}, {table.machine}")
    return 0


def _import_kernels() -> None:
    """Load vLLM's kernels; raises InputError where it cannot measure."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"profile: measures vLLM's GEMMs, and vLLM is not installed ({error})") from None
    if not current_platform.is_cpu():
        raise InputError("profile: measures CPUs only; for a GPU compute the latencies with --gpu")
    current_platform.import_kernels()


def _table(arguments: argparse.Namespace, projections: "list[Projection]") -> "LatencyTable":
    """The table of the model's projections, computed or measured."""
    if arguments.gpu:
        from pgsvd_vllm.cli.computed_latency import computed_latencies

        return computed_latencies(arguments.gpu, projections, arguments.tokens, arguments.dtype)
    import torch

    from pgsvd_vllm.serving.gemm.latency import measure

    shapes = sorted({(p.out_features, p.in_features) for p in projections})
    dtype = getattr(torch, arguments.dtype)
    return measure(shapes, arguments.tokens, dtype, lambda line: print(line, flush=True))
