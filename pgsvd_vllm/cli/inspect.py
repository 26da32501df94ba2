"""Show the ranks, bytes and errors of a checkpoint, per projection and in total."""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.cli.model_arguments import add_checkpoint, checkpoint_folder
from pgsvd_vllm.errors import CheckpointError, InputError, PgsvdError, bytes_text

if TYPE_CHECKING:
    from pgsvd_vllm.format.reader import Checkpoint

# Widest column of names; longer names stick out.
MAX_WIDTH = 100

EXAMPLES = (
    "inspect DIR",
    "inspect DIR --tp 4",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_checkpoint(parser)
    parser.add_argument(
        "-tp",
        "--tp",
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="also show the memory and communication of each of N tensor-parallel ranks",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table; returns the exit status and raises InputError or CheckpointError."""
    if arguments.tp < 1:
        raise InputError(f"--tp {arguments.tp}: must be 1 or more")
    from pgsvd_vllm.format.module_report import module_rows
    from pgsvd_vllm.format.reader import open_checkpoint
    from pgsvd_vllm.format.schema import REPORT_NAME

    checkpoint = open_checkpoint(checkpoint_folder(arguments))
    with _well_formed(checkpoint, REPORT_NAME):
        lines = table(checkpoint, module_rows(checkpoint))
    lines += ["", *(f"{name:21} {value}" for name, value in facts(checkpoint))]
    if arguments.tp > 1:
        with _well_formed(checkpoint, "config.json"):
            lines += tensor_parallel(checkpoint, arguments.tp)
    print("\n".join(lines))
    return 0


@contextmanager
def _well_formed(checkpoint: "Checkpoint", name: str) -> Iterator[None]:
    """Name a file of the checkpoint in the error for values of other types in it; raises CheckpointError."""
    try:
        yield
    except PgsvdError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = checkpoint.folder / name
        raise CheckpointError(f"{where}: malformed ({type(error).__name__}: {error})") from None


def table(checkpoint: "Checkpoint", rows: list[dict[str, Any]]) -> list[str]:
    """One line per projection: shape, rank, kept share of parameters, bits per weight, MB and relative output error.

    Bits are those of the stored tensors, scales included, for each element of the dense weight.

    Args:
        checkpoint: to show.
        rows: of the per-module report.
    """
    width = min(max([len(row["name"]) for row in rows] + [10]), MAX_WIDTH)
    lines = [f"{'projection':{width}}  {'out':>6} {'in':>6} {'rank':>6} {'kept':>6} {'bits':>5} {'MB':>8} {'error':>7}"]
    for row in rows:
        dense = row["out_features"] * row["in_features"]
        module = checkpoint.modules.get(row["name"])
        stored = checkpoint.stored(row["name"])
        size = sum(info.nbytes for info in stored)
        numel = sum(info.numel for info in stored)
        if module is not None and module.schemes:
            shapes = module.shapes(row["out_features"], row["in_features"])
            numel = sum(math.prod(shape) for shape in shapes.values())
        rank = "dense" if row["rank"] is None else str(row["rank"])
        error = "-" if row["error"] is None else f"{row['error']:.4f}"
        lines.append(
            f"{row['name']:{width}}  {row['out_features']:6} {row['in_features']:6} {rank:>6} "
            f"{numel / dense:6.1%} {8 * size / dense:5.1f} {size / 1e6:8.2f} {error:>7}"
        )
    return lines


def tensor_parallel(checkpoint: "Checkpoint", tp_size: int) -> list[str]:
    """One line per vLLM layer with its tensor-parallel cut, memory and communication, and the totals.

    Args:
        checkpoint: to show.
        tp_size: number of tensor-parallel ranks.

    Raises:
        InputError: a layer cannot be sharded over so many ranks, or an environment variable is invalid.
    """
    from pgsvd_vllm.parallel.comm_plan import VARIABLE, Cut, collective_bytes
    from pgsvd_vllm.parallel.preview import preview

    least = collective_bytes()
    plans = list(preview(checkpoint, tp_size, least))
    names = [", ".join((p.names[0], *(name.rpartition(".")[2] for name in p.names[1:]))) for p in plans]
    width = max(map(len, [*names, "layer"]))
    lines = ["", f"{'layer':{width}}  {'cut':21} {'MB':>8} {'of all':>7} {'sent':>7} {'dense':>7}"]
    for name, p in zip(names, plans, strict=True):
        share = f"{p.here / p.whole:7.1%} {p.sent:7} {p.dense:7}"
        lines.append(f"{name:{width}}  {p.cut.name.lower():21} {p.here / 1e6:8.2f} {share}")
    here, whole = sum(p.here for p in plans), sum(p.whole for p in plans)
    sent, dense = sum(p.sent for p in plans), sum(p.dense for p in plans)
    lines += ["", f"on each of {tp_size} ranks     {here / 1e6:.1f} MB of {whole / 1e6:.1f} MB ({here / whole:.1%})"]
    lines.append(
        f"sent per token        {sent} elements, those of an all-reduce counted twice, of an all-gather once; "
        f"dense {dense}"
    )
    if any(module.kind == "expert" for module in checkpoint.modules.values()):
        lines.append("MoE experts are counted in factors, as on CPU; on GPUs their dense weights are reconstructed")
    lines += [f"  {cut.name.lower():21} {cut.value}" for cut in Cut if any(p.cut is cut for p in plans)]
    lines.append(
        f"Every additional collective must save {least / 1e6:.1f} MB per rank ({VARIABLE}, for vllm serve as well; "
        "0: the least memory)"
    )
    return lines


def facts(checkpoint: "Checkpoint") -> Iterator[tuple[str, str]]:
    """Name and value of the totals and the origin of a checkpoint.

    Raises:
        CheckpointError: config.json has values of other types; names it.
    """
    with _well_formed(checkpoint, "config.json"):
        yield from _facts(checkpoint)


def _facts(checkpoint: "Checkpoint") -> Iterator[tuple[str, str]]:
    section = checkpoint.quantization_config
    modules = checkpoint.modules
    sizes = {name: sum(info.nbytes for info in checkpoint.stored(name)) for name in modules}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    part = sum(sizes[name] for name in checkpoint.factored)
    tolerance = ", ".join(f"{tower} {value:.4f}" for tower, value in section.get("tolerance", {}).items())
    ratio, calibration = section.get("ratio", {}), section.get("calibration")
    yield "factored projections", f"{len(checkpoint.factored)}, {bytes_text(part)} of {bytes_text(total)}"
    rule = section.get("baseline") or (f"tolerance {tolerance}" if tolerance else "measured losses")
    yield "method", f"{section.get('method')}" + ("" if calibration is None else f", ranks by {rule}")
    forms = Counter(modules[name].form for name in checkpoint.factored)
    served = {"cpu": ", for serving on CPUs", "gpu": ", for serving on GPUs"}.get(str(section.get("serve_on")), "")
    if forms:
        counts = " and ".join(f"{count} in the form {form}" for form, count in forms.most_common())
        yield "stored", f"{counts}{served}"
    schemes = sorted({scheme.name for module in modules.values() for scheme in module.schemes.values()})
    if schemes:
        shapes = [checkpoint.shape(name) for name in modules]
        bits = 8 * sum(sizes.values()) / sum(out * width for out, width, _ in shapes)
        yield "quantized", f"{' and '.join(schemes)}: {bits:.2f} bits per weight of the projections"
    if ratio:
        yield (
            "removed",
            f"{ratio['linear']:.1%} of the projections, {ratio['total']:.1%} of the model "
            f"(kept: {1 - ratio['linear']:.1%} and {1 - ratio['total']:.1%})",
        )
    if calibration is not None:
        yield "calibration", f"{calibration.get('name')}, {calibration.get('tokens')} tokens"
    yield "base model", f"{section.get('base_model')} (revision {section.get('base_revision') or 'unknown'})"
    command = section.get("command")
    yield "made by", f"pgsvd-vllm {section.get('tool_version')}" + (f": {command}" if command else "")
