"""Measure dense and low-rank GEMM latency for a model's shapes on this machine, for compress --objective latency.

It runs on the serving machine with vLLM installed; weight values do not matter.
"""

import argparse
from pathlib import Path

from pgsvd_vllm.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", metavar="MODEL", help="local model folder or Hugging Face id")
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
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Measure latencies and write the table; returns the exit status and raises PgsvdError."""
    if not 1 <= arguments.tokens <= 65536:
        raise InputError(f"--tokens {arguments.tokens}: must be a number of tokens from 1 to 65536")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"profile: measures vLLM's GEMMs, and vLLM is not installed ({error})") from None
    if not current_platform.is_cpu():
        raise InputError("profile: supports CPUs only; on a GPU omit --objective")
    import torch

    from pgsvd_vllm.format.latency_table import write_latencies
    from pgsvd_vllm.offline.model.find_projections import find_projections
    from pgsvd_vllm.offline.model.hub import resolve_folder
    from pgsvd_vllm.offline.model.source import ModelSource
    from pgsvd_vllm.serving.gemm.latency import measure

    if not arguments.output.resolve().parent.is_dir():
        raise InputError(f"--output {arguments.output}: cannot be written (no such folder)")
    if arguments.output.is_dir():
        raise InputError(f"--output {arguments.output}: is a folder; name a file to write")
    source = ModelSource(resolve_folder(arguments.model, arguments.trust_remote_code), arguments.trust_remote_code)
    shapes = sorted({(p.out_features, p.in_features) for p in find_projections(source).flat})
    current_platform.import_kernels()
    dtype = getattr(torch, arguments.dtype)
    table = measure(shapes, arguments.tokens, dtype, lambda line: print(line, flush=True))
    try:
        write_latencies(table, arguments.output)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"wrote {arguments.output}: {len(shapes)} shapes, {arguments.tokens} tokens, {table.dtype}, {table.machine}")
    return 0
