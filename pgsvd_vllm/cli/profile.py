"""Time dense and low-rank products of a model's shapes on this machine, for compress --objective latency.

Run it where the model will be served, with vLLM installed there; the weights' values do not matter.
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
        help="multiplied at once: 1 for the latency of one request (default), more for a server with many",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="as the model will be served (default bfloat16)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the table; raises PgsvdError."""
    if not 1 <= arguments.tokens <= 65536:
        raise InputError(f"--tokens {arguments.tokens}: must be a number of tokens from 1 to 65536")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"profile: times products as vLLM serves them, and vLLM is not installed ({error})") from None
    if not current_platform.is_cpu():
        raise InputError("profile: times CPUs only so far; on a GPU leave --objective out")
    import torch

    from pgsvd_vllm.format.latency_table import write_latencies
    from pgsvd_vllm.offline.model.hub import resolve_folder
    from pgsvd_vllm.offline.model.source import ModelSource
    from pgsvd_vllm.serving.gemm.latency import measure

    if not arguments.output.resolve().parent.is_dir():
        raise InputError(f"--output {arguments.output}: cannot be written (no such folder)")
    if arguments.output.is_dir():
        raise InputError(f"--output {arguments.output}: is a folder; name a file to write")
    source = ModelSource(resolve_folder(arguments.model), arguments.trust_remote_code)
    shapes = sorted({(p.out_features, p.in_features) for row in source.projections() for p in row})
    current_platform.import_kernels()
    dtype = getattr(torch, arguments.dtype)
    table = measure(shapes, arguments.tokens, dtype, lambda line: print(line, flush=True))
    try:
        write_latencies(table, arguments.output)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"wrote {arguments.output}: {len(shapes)} shapes, {arguments.tokens} tokens, {table.dtype}, {table.machine}")
    return 0
