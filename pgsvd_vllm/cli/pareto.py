"""Show what each size of a model costs: one calibration, many sizes, measured perplexity, one HTML page.

Sizes are factored without the error-aware fit and distillation that compress adds, unless --methods has full: a real
compress loses less. Needs pip install 'pgsvd-vllm[plot]'.
"""

import argparse
import hashlib
import json
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.cli.flags import with_flags
from pgsvd_vllm.cli.model_arguments import add_model
from pgsvd_vllm.errors import InputError, PgsvdError, bytes_text, lacks_memory, refusal_of
from pgsvd_vllm.offline.sweep.methods import METHODS, Case

if TYPE_CHECKING:
    from pgsvd_vllm.offline.planning.plan import Plan

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
DENSE = "dense"
LENGTH = 1024
# The charts that a run may write.
CHARTS = ("removed", "bytes", "time", "predicted")

EXAMPLES = (
    "pareto MODEL -o sizes",
    "pareto MODEL -o sizes --ratios 0.2 0.4 --methods pgsvd svd-llm --tasks arc_easy",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser)
    parser.add_argument(
        "-o",
        "--output-dir",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder of pareto.html, .json and .svg, and of the calibration, which compress --calibration can use; "
        "the same command continues there after an interruption, or with more sizes",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=list(RATIOS),
        metavar="R",
        help="shares of the projections' parameters to remove (default 0.1 to 0.6)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["pgsvd"],
        help="pgsvd: our ranks, factored in one step (default); full: all that compress does, which takes much longer; "
        "uniform: the paper's one tolerance; and the baselines of compress",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME|FILE|FOLDER",
        help="calibration text, as of compress --dataset (default: what the model samples from itself)",
    )
    parser.add_argument("--num-calibration-samples", type=int, metavar="N", help="windows, as of compress")
    parser.add_argument(
        "--max-seq-length", type=int, default=LENGTH, metavar="L", help=f"tokens per window (default {LENGTH})"
    )
    parser.add_argument(
        "--eval-dataset",
        metavar="NAME|FILE|FOLDER",
        help="text for perplexity (default: docstrings of Python's standard library); take text that calibration has "
        "not seen",
    )
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="windows of this text (default 16)")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="also run tasks of lm_eval, as of evaluate --tasks"
    )
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="latency table written by pgsvd-vllm profile: also show the GEMM time of every size",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples of every task alone")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the calibration (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if available)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Measure all sizes and write the page; returns the exit status and raises PgsvdError."""
    _check(arguments)
    start = time.monotonic()
    try:
        found = _Results(arguments.output_dir, _request(arguments))
        _measure(arguments, found)
        _write(arguments.output_dir, found)
    except PgsvdError:
        raise
    except Exception as error:  # of the system; safetensors and torch have kinds of their own
        output = f"--output-dir {arguments.output_dir}"
        refused = f"{output}: not enough memory is free" if lacks_memory(error) else refusal_of(error, output)
        if refused is None:
            raise
        raise InputError(f"{refused}; what is finished is kept, repeat the command") from None
    print(f"wrote {arguments.output_dir / 'pareto.html'} after {time.monotonic() - start:.0f} s")
    print(f"compress one of them:  {_compress_line(arguments)}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before any model is loaded; raises InputError."""
    from pgsvd_vllm.evaluation.tasks import check_tasks
    from pgsvd_vllm.format.latency_table import read_latencies
    from pgsvd_vllm.report.page import check_libraries

    check_libraries()
    arguments.ratios, arguments.methods = sorted(set(arguments.ratios)), list(dict.fromkeys(arguments.methods))
    for ratio in arguments.ratios:
        if not 0 < ratio < 1:
            raise InputError(f"--ratios {ratio}: must be between 0 and 1")
    if arguments.num_samples < 2:
        raise InputError(f"--num-samples {arguments.num_samples}: must be at least 2")
    check_tasks(arguments.tasks, arguments.limit)
    arguments.table = None if arguments.costs is None else read_latencies(arguments.costs)


def _request(arguments: argparse.Namespace) -> dict[str, str]:
    """Option -> hash of its value, of those that the measured values depend on: a published file names no paths."""
    names = ("model", "revision", "dataset", "num_calibration_samples", "max_seq_length", "seed")
    judged = ("eval_dataset", "num_samples", "tasks", "limit")
    values = {name: json.dumps(getattr(arguments, name)) for name in (*names, *judged)}
    values["costs"] = repr(arguments.table)
    return {
        f"--{name}".replace("_", "-"): hashlib.sha256(value.encode()).hexdigest()[:16] for name, value in values.items()
    }


def _compress_line(arguments: argparse.Namespace) -> str:
    """The command that compresses with the same calibration."""
    parts = ["pgsvd-vllm", "compress", arguments.model, "-o", "DIR", "--ratio", "R"]
    for name in arguments.dataset or ():
        parts += ["--dataset", name]
    defaults: dict[str, Any] = {
        "revision": None,
        "num_calibration_samples": None,
        "max_seq_length": LENGTH,
        "seed": 0,
        "device": "auto",
    }
    for name, default in defaults.items():
        if getattr(arguments, name) != default:
            parts += [f"--{name}".replace("_", "-"), str(getattr(arguments, name))]
    parts += ["--trust-remote-code"] if arguments.trust_remote_code else []
    return shlex.join([*parts, "--calibration", str(arguments.output_dir / "calibration")])


class _Results:
    """The measured values, kept in pareto.json after every case.

    Args:
        folder: of the file, created if it is missing.
        request: that the values are for.

    Raises:
        InputError: the folder holds values for another request.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, request: dict[str, str]) -> None:
        from pgsvd_vllm.format.reader import read_json

        self._path = folder / "pareto.json"
        self.values: dict[str, Any] = {"request": request, "cases": {}}
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            self.values = read_json(self._path)
            old = self.values.get("request")
            if old != request or not isinstance(self.values.get("cases"), dict):
                changed = [key for key in request if not isinstance(old, dict) or old.get(key) != request[key]]
                raise InputError(f"{self._path}: made with another {', '.join(changed)}; choose another --output-dir")
        self.save()  # before hours of work

    def has(self, case: Case) -> bool:
        """Whether a case is measured."""
        return _key(case) in self.values["cases"]

    def put(self, case: Case, row: dict[str, Any]) -> None:
        """Keep the values of a case."""
        self.values["cases"][_key(case)] = row
        self.save()

    def save(self) -> None:
        """Write the file; an interruption leaves it as it was."""
        part = self._path.with_suffix(".writing")
        part.write_text(json.dumps(self.values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self._path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of everything that was measured, by method and size."""
        order = [DENSE, *METHODS]
        return sorted(self.values["cases"].values(), key=lambda row: (order.index(row["method"]), row["ratio"]))


def _key(case: Case) -> str:
    return f"{case.method} {case.ratio}"


def _write(folder: Path, found: _Results) -> None:
    """Write the page and the charts, and print the table."""
    from pgsvd_vllm.report.sweep_report import front_of, sweep_charts, sweep_report

    rows, values = found.rows, found.values
    facts = [
        ("calibrated on", str(values["calibration"])),
        ("perplexity on", f"{values['text']}, dense {values['dense']:.3f}"),
    ]
    if values.get("machine"):
        facts.append(("GEMM times of", str(values["machine"])))
    charts = sweep_charts(rows)
    for name in CHARTS:
        path = folder / f"pareto-{name}.svg"
        if name in charts:
            path.write_text(charts[name], encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    page = sweep_report(f"{values['model']}: sizes and quality", facts, rows, charts)
    (folder / "pareto.html").write_text(page, encoding="utf-8")
    front = front_of(rows)
    print(f"{'method':8} {'removed':>8} {'MB':>8} {'x dense':>8}")
    for n, row in enumerate(rows):
        multiple = "failed" if row["multiple"] is None else f"{row['multiple']:.3f}"
        mark = "  on the front" if n in front else ""
        print(f"{row['method']:8} {row['removed']:8.1%} {row['bytes'] / 1e6:8.1f} {multiple:>8}{mark}")


def _measure(arguments: argparse.Namespace, found: _Results) -> None:
    """Measure what is missing; raises PgsvdError as `compress`."""
    cases = [Case(method, ratio) for ratio in arguments.ratios for method in arguments.methods]
    todo, dense = [case for case in cases if not found.has(case)], Case(DENSE, 0.0)
    if not todo and found.has(dense):
        return
    from pgsvd_vllm.evaluation.perplexity import text_windows
    from pgsvd_vllm.offline.compress import with_text
    from pgsvd_vllm.offline.data.text import load_tokenizer
    from pgsvd_vllm.offline.data.tokens import window_length
    from pgsvd_vllm.offline.model.hub import public_name
    from pgsvd_vllm.offline.options import CompressOptions
    from pgsvd_vllm.offline.output.report import data_name
    from pgsvd_vllm.offline.planning.prepare import open_state, prepare
    from pgsvd_vllm.offline.settings import MEASURED
    from pgsvd_vllm.offline.sweep.run import gemm_time, sweep

    folder: Path = arguments.output_dir
    options = CompressOptions(
        model=arguments.model,
        revision=arguments.revision,
        output=folder / "work",
        dataset=None if arguments.dataset is None else tuple(arguments.dataset),
        num_calibration_samples=arguments.num_calibration_samples,
        max_seq_length=arguments.max_seq_length,
        seed=arguments.seed,
        calibration=folder / "calibration",
        device=arguments.device,
        resume=True,
        trust_remote_code=arguments.trust_remote_code,
    )
    plan = prepare(options, _say)
    source = plan.source
    tokenizer = load_tokenizer(source.folder, arguments.trust_remote_code)
    length = window_length(source.config, arguments.max_seq_length)
    text, windows = text_windows(arguments.eval_dataset, tokenizer, arguments.num_samples, length, "--eval-dataset")
    plan = with_text(plan, options, _say)
    found.values |= {"model": public_name(arguments.model), "calibration": data_name(plan), "text": text}
    if arguments.table is not None:
        found.values["machine"] = f"{arguments.table.machine}, {arguments.table.tokens} tokens"
    if not found.has(dense):
        value, tasks = _judge(arguments, source.folder, plan, windows, DENSE)
        if not math.isfinite(value):
            raise InputError(f"MODEL {arguments.model}: its own perplexity on {text} is not a finite number")
        found.values["dense"] = value
        row = {"method": DENSE, "ratio": 0.0, "removed": 0.0, "bytes": source.weights.nbytes, "perplexity": value}
        time_share = None if arguments.table is None else 1.0
        found.put(dense, {**row, "multiple": 1.0, "predicted": None, "gemm_time": time_share, "tasks": tasks})
    state = open_state(plan, _say)
    try:
        for case, result in sweep(plan, state, todo, _say):
            label = f"{case.method} {case.ratio:.1%}"
            if isinstance(result, str):
                _say(f"WARNING: {label}: {result.replace('`ratio`', '--ratios')}")
                continue
            value, tasks = _judge(arguments, state.checkpoint, plan, windows, label)
            size = sum(info.stat().st_size for info in state.checkpoint.glob("*.safetensors"))
            finite = math.isfinite(value)
            in_nats = plan.settings.sensitivity == MEASURED
            row = {
                "method": case.method,
                "ratio": case.ratio,
                "removed": result.ratios["linear"],
                "bytes": size,
                "perplexity": value if finite else None,
                "multiple": value / found.values["dense"] if finite else None,
                # From forward passes alone it is no number of nats.
                "predicted": result.choice.allocation.loss if in_nats else None,
                "gemm_time": None
                if arguments.table is None
                else gemm_time(plan, result.choice.allocation.modules, arguments.table),
                "tasks": tasks,
            }
            found.put(case, row)
            _say(f"{label}: {bytes_text(size)}, perplexity {value:.3f}")
        state.discard()
    finally:
        state.close()


def _judge(
    arguments: argparse.Namespace, folder: Path, plan: "Plan", windows: Any, label: str
) -> tuple[float, dict[str, float]]:
    """Perplexity and task scores of a model in a folder."""
    from pgsvd_vllm.evaluation.models import load_model, release
    from pgsvd_vllm.evaluation.perplexity import perplexity
    from pgsvd_vllm.evaluation.tasks import Job, score

    model = load_model(folder, plan.settings.device, arguments.trust_remote_code)
    value = perplexity(model, windows, desc=f"perplexity of {label}")
    del model
    release()
    if not arguments.tasks:
        return value, {}
    job = Job(str(folder), arguments.tasks, "hf", arguments.limit, arguments.device, "", arguments.trust_remote_code)
    return value, {task: values.mean().item() for task, (_, values) in score(job).items()}


def _say(line: str) -> None:
    """Print a progress line with the flags of its options."""
    print(with_flags(line), flush=True)
