"""Compress a model into a folder that vLLM serves."""

import argparse
import math
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pgsvd_vllm.cli.flags import shareable_command
from pgsvd_vllm.cli.log import say
from pgsvd_vllm.cli.model_arguments import add_model, add_output, add_text_column
from pgsvd_vllm.cli.report import REPORT
from pgsvd_vllm.cli.served_by import serving_lines
from pgsvd_vllm.errors import InputError, bytes_text, reason_of

if TYPE_CHECKING:
    from pgsvd_vllm.offline.planning.plan import Plan

EXAMPLES = (
    "compress meta-llama/Llama-3.1-8B -o llama-20 --ratio 0.2",
    "compress MODEL -o DIR --bits auto --target-bytes 4G",
    "compress MODEL -o DIR --ratio 0.3 --dataset chats.jsonl --dataset self",
    "compress MODEL -o DIR --target-loss 0.05 --dry-run",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser)
    add_output(parser)
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="options from a YAML file, such as the pgsvd_recipe.yaml of another compressed model; options given here "
        "replace its own",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--ratio",
        type=shares,
        metavar="R",
        help="share of the projections' parameters to REMOVE, 0 to 1 (default 0.2: four fifths are kept); with "
        "--objective latency, share of their GEMM time; one share per tower: vision=0.1,projector=0.1,language=0.3 "
        "(towers that are not named stay dense; --dry-run lists a model's towers)",
    )
    size.add_argument(
        "--tolerance",
        type=shares,
        metavar="E",
        help="instead of --ratio: relative output error allowed in every projection, or one value per tower: "
        "vision=E,projector=E,language=E",
    )
    size.add_argument(
        "--target-bytes",
        type=byte_count,
        metavar="SIZE",
        help="instead of --ratio: largest size of the written weights, such as 500M or 3.5G (units are powers of 1000) "
        "or 4GiB; with --bits auto this is all that needs to be said",
    )
    size.add_argument(
        "--target-loss",
        type=float,
        metavar="NATS",
        help="instead of --ratio: the smallest model within this predicted loss in nats per token, such as 0.1, which "
        "multiplies perplexity by 1.1; the error-aware fit and distillation lower it, by half in what was measured",
    )
    size.add_argument(
        "--target-latency",
        type=float,
        metavar="MS",
        help="instead of --ratio, with --costs: the model of least predicted loss whose projections' GEMMs take at "
        "most so many milliseconds in a forward pass of the table's number of tokens",
    )
    parser.add_argument(
        "--objective",
        choices=["size", "latency"],
        default="size",
        help="what ranks minimize and --ratio is a share of: parameters (default), or the GEMM latency of the serving "
        "machine (--costs); projections that low rank does not make faster then stay dense",
    )
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="latency table written by pgsvd-vllm profile: measured on the serving machine, or computed for a GPU",
    )
    parser.add_argument(
        "--sensitivity",
        choices=["measured", "forward", "uniform"],
        help="loss metric of each projection: from loss gradients (measured, default), from forward passes alone "
        "(forward: less accurate, the default if gradients do not fit in memory), or none (uniform: one tolerance for "
        "all and alternating least squares, as in the PGSVD paper; the default with --tolerance)",
    )
    parser.add_argument(
        "--baseline",
        choices=["svd", "asvd", "svd-llm", "pifa"],
        help="use a baseline method for comparison: the same ratio for every projection",
    )
    parser.add_argument(
        "--form",
        choices=["pivot", "factors"],
        help="how a low-rank matrix is stored: as pivot rows and the coefficients of the other rows (pivot: fewer "
        "parameters at the same rank, the default), or as two factors (faster on GPUs, and less sensitive to rounding; "
        "the default with --serve-on gpu, for matrices of 4 bits and with --sensitivity uniform)",
    )
    parser.add_argument(
        "--serve-on",
        choices=["cpu", "gpu"],
        help="where the model will be served, which decides the default --form (default: the kind of machine of "
        "--costs, else the one that compresses)",
    )
    parser.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="error-aware fit: fit each layer to activations from the already compressed layers, in a second pass over "
        "the calibration set (default; not with --sensitivity uniform)",
    )
    parser.add_argument(
        "--refine",
        type=amount,
        nargs="?",
        const=(20.0, None),
        default=(None, None),
        metavar="MINUTES|TOKENS",
        help="train all factors by knowledge distillation from the dense model, on the calibration text and more text "
        "of its kind: for so many minutes (20 if no number is given), or on so many tokens with k or M, such as 500k; "
        "0 leaves it out; with 4 bits a third of it trains their scales. Default: 102k tokens, at most two passes, "
        "up to 410k on a GPU, fewer or none for large models on a CPU; none if memory or text is short, for models "
        "that take images, with --include experts, or without measured sensitivities. Keeps the whole model in memory",
    )
    parser.add_argument(
        "--bits",
        default="16",
        choices=["16", "8", "fp8", "4", "auto"],
        help="quantize the projections, factored or dense, after all else, with error compensation: 8 is INT8 and fp8 "
        "is FP8 (e4m3), both with one scale per output and activations quantized per token; 4 is INT4 in groups of 32 "
        "with 16-bit activations; auto chooses 16 bits, INT8, or INT4 in groups of 32, 64 or 128 for each projection, "
        "together with its rank: the least predicted loss for a size, which --target-bytes or --ratio gives, the "
        "latter as the share of the projections' BYTES to remove (default 16: none)",
    )
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--dataset",
        action="append",
        metavar="NAME|FILE|FOLDER",
        help="a text file; a .jsonl, .json, .csv, .tsv, .parquet or .arrow file whose rows have a text, messages, "
        "conversations, prompt and completion, instruction and output, or question and answer; a folder of such files; "
        "OWNER/NAME, OWNER/NAME:CONFIGURATION or OWNER/NAME:CONFIGURATION:SPLIT of a hub dataset of such rows; "
        "wikitext2 or c4 (from the hub); self: text that the model samples from itself (default; kept in the user's "
        "cache); python-docs: English prose that comes with Python (default where the model cannot sample); for "
        "vision-language models a folder with captions.jsonl, whose rows have an image and a text, a folder of images "
        "alone, for which the model writes the texts, or a hub dataset with such columns; repeat the option to mix "
        "several",
    )
    add_text_column(data)
    data.add_argument(
        "--num-calibration-samples",
        type=int,
        metavar="N",
        help="windows of text, or image-text pairs (default 128; 40 of the model's own text on a CPU; 128 to 512 of "
        "text on a GPU, by the model's size; 1024 for contrastive models such as CLIP)",
    )
    data.add_argument("--max-seq-length", type=int, default=1024, metavar="L", help="tokens per window (default 1024)")
    data.add_argument(
        "--chat-template",
        action="store_true",
        help="format plain text as conversations with the model's chat template: paragraphs become user and assistant "
        "turns in alternation (rows with messages, or with a prompt and its answer, always use the template)",
    )
    data.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="store and reuse calibration results there: other ratios, forms and baselines need no new calibration",
    )
    data.add_argument("--seed", type=int, default=0, help="random seed for sampling windows and pairs (default 0)")
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="leave matching projections dense, such as '*.down_proj' or 'model.layers.0.*'; they count as kept",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        choices=["experts", "lm_head"],
        help="also compress MoE experts (vLLM computes with their factors on CPU; on GPUs dense weights are "
        "reconstructed at load, so only the files are smaller) or an LM head that is not tied to the embeddings; "
        "repeat the option for both",
    )
    parser.add_argument(
        "--head-tolerance",
        type=float,
        metavar="E",
        help="relative error allowed in the LM head, weighted by token probability (default 0.02)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the written tensors and of calibration (default auto: the model's dtype)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if available)")
    parser.add_argument(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="memory that the run may take, such as 16GiB, of the GPU if one computes (default: what is free, within "
        "the limits of a container): what does not fit is left out or computed again, and the plan says so",
    )
    parser.add_argument(
        "--executor",
        default="local",
        choices=["local", "ray"],
        help="what runs the calibration samples and the solvers: this process, or the workers of a Ray cluster; the "
        "result has the same bytes (default local)",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="address of the Ray cluster, such as auto (default: a new one on this machine)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from DIR.partial")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, memory, disk and time; write nothing")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def shares(text: str) -> float | dict[str, float]:
    """Parse one number, or one number per tower such as `vision=0.1,language=0.3`; raises ValueError."""
    if "=" not in text:
        return float(text)
    found = {}
    for part in text.split(","):
        tower, _, value = part.partition("=")
        if not tower or tower in found:
            raise ValueError(text)
        found[tower] = float(value)
    return found


def byte_count(text: str) -> int:
    """Parse a size such as `500M`, `3.5G`, `4GiB` or a number of bytes; raises ValueError."""
    found = re.fullmatch(r"([0-9.]+) ?(?:([kKMGT])(i?)B?|B?)", text)
    if found is None:
        raise ValueError(text)
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper())
    if not math.isfinite(size):
        raise ValueError(text)
    return round(size)


def amount(text: str) -> tuple[float | None, int | None]:
    """Parse `15` as minutes, and `500k` or `2M` as tokens; the other element is None."""
    unit = {"k": 1000, "M": 1000_000}.get(text[-1:])
    if unit is None:
        return float(text), None
    tokens = float(text[:-1]) * unit
    if not math.isfinite(tokens):
        raise ValueError(text)
    return None, round(tokens)


def run(arguments: argparse.Namespace) -> int:
    """Compress the model, or show the plan; returns the exit status and raises PgsvdError.

    Heavy imports happen after the arguments have been checked.
    """
    from pgsvd_vllm.offline.compress import compress, finish
    from pgsvd_vllm.offline.options import HEAD_TOLERANCE, CompressOptions
    from pgsvd_vllm.offline.output.messages import describe, duration
    from pgsvd_vllm.offline.planning.prepare import prepare

    if (arguments.objective == "latency") != (arguments.costs is not None) and arguments.target_latency is None:
        raise InputError(
            "--objective latency and --costs FILE go together; make the file on the serving machine with: "
            f"pgsvd-vllm profile {arguments.model} -o FILE (for a GPU, on any machine: --gpu H100)"
        )
    if arguments.head_tolerance is not None and "lm_head" not in arguments.include:
        raise InputError("--head-tolerance: needs --include lm_head")
    options = CompressOptions(
        model=arguments.model,
        revision=arguments.revision,
        output=arguments.output_dir,
        ratio=arguments.ratio,
        tolerance=arguments.tolerance,
        target_bytes=arguments.target_bytes,
        target_loss=arguments.target_loss,
        target_latency=arguments.target_latency,
        sensitivity=arguments.sensitivity,
        baseline=arguments.baseline,
        form=arguments.form,
        serve_on=arguments.serve_on,
        sequential=arguments.sequential,
        refine=arguments.refine[0],
        refine_tokens=arguments.refine[1],
        bits=arguments.bits,
        costs=arguments.costs,
        dataset=None if arguments.dataset is None else tuple(arguments.dataset),
        num_calibration_samples=arguments.num_calibration_samples,
        max_seq_length=arguments.max_seq_length,
        text_column=arguments.text_column,
        chat_template=arguments.chat_template,
        seed=arguments.seed,
        ignore=tuple(arguments.ignore),
        include=tuple(dict.fromkeys(arguments.include)),
        head_tolerance=HEAD_TOLERANCE if arguments.head_tolerance is None else arguments.head_tolerance,
        calibration=arguments.calibration,
        dtype=arguments.dtype,
        device=arguments.device,
        memory_budget=arguments.memory_budget,
        executor=arguments.executor,
        address=arguments.address,
        resume=arguments.resume,
        trust_remote_code=arguments.trust_remote_code,
        command=shareable_command(sys.argv[1:]),
    )
    if arguments.dry_run:
        plan = prepare(options, say)
        say(describe(plan))
        _say_serving(plan)
        print(_needs(plan))
        print(f"would write: {options.output} (dry run: nothing was written)")
        return 0
    if finish(options):
        print(f"{options.output} is complete: the run was interrupted only while it deleted its own files")
        return 0
    start = time.monotonic()
    result = compress(options, say, _say_plan, _write_page)
    size = sum(f.stat().st_size for f in result.output.glob("*.safetensors"))
    linear, total = result.ratios["linear"], result.ratios["total"]
    print(
        f"wrote {result.output}: {bytes_text(size)} (dense {bytes_text(result.bytes_before)}), "
        f"{result.parameters_after / 1e6:.1f} M parameters ({total:.1%} of the model and {linear:.1%} of its "
        f"projections removed; {1 - total:.1%} kept) in {duration(time.monotonic() - start)}"
    )
    if (result.output / REPORT).is_file():
        print(f"report:    {result.output / REPORT}")
    pooling = " --runner pooling" if result.is_dual_encoder else ""
    print(f"serve it:  vllm serve {shlex.quote(str(result.output))} --load-format pgsvd{pooling}")
    return 0


def _write_page(folder: Path) -> None:
    """Write the checkpoint's report, where its libraries are installed; the checkpoint is complete without it."""
    from pgsvd_vllm.cli.report import write_report
    from pgsvd_vllm.report.page import missing_libraries

    if missing_libraries():
        print("no report.html: pip install 'pgsvd-vllm[plot]', then pgsvd-vllm report DIR")
        return
    try:
        write_report(folder, folder / REPORT)
    except Exception as error:  # of the plotting library: hours of work are not to end with an error
        print(f"WARNING: no report.html: {reason_of(error)}")


def _say_plan(plan: "Plan") -> None:
    """Print what vLLM will make of the result, and what the run needs."""
    _say_serving(plan)
    say(_needs(plan))


def _say_serving(plan: "Plan") -> None:
    """Print what vLLM will make of the result."""
    for line in serving_lines(plan):
        say(line)


def _needs(plan: "Plan") -> str:
    """The line about memory, disk and time."""
    from pgsvd_vllm.offline.output.messages import duration
    from pgsvd_vllm.offline.planning.resources import estimate

    need = estimate(plan)
    memory, disk, time_needed = bytes_text(need.memory), bytes_text(need.disk), duration(need.seconds)
    return f"needs about: {memory} memory, {disk} disk space, {time_needed}"
