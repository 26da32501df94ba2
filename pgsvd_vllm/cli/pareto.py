"""Show what each size of a model costs: one calibration, many sizes, measured perplexity, one HTML page.

Sizes are factored without the error-aware fit and distillation that compress adds, unless --methods has full: a real
compress loses less. Needs pip install 'pgsvd-vllm[plot]'.
"""

import argparse
import math
import shlex
import time
from pathlib import Path
from typing import Any

from pgsvd_vllm.cli.log import say
from pgsvd_vllm.cli.measured import (
    CALIBRATED_BY,
    JUDGED_BY,
    LENGTH,
    Measured,
    add_folder,
    add_measurement,
    calibration_options,
    check_measurement,
    dense_perplexity,
    held_out_windows,
    perplexity_of,
    refusals_named,
    request_of,
    texts_of,
)
from pgsvd_vllm.cli.model_arguments import add_model
from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.sweep.methods import METHODS, Case

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
DENSE = "dense"
# The charts that a run may write.
CHARTS = ("removed", "bytes", "time", "predicted")

EXAMPLES = (
    "pareto MODEL -o sizes",
    "pareto MODEL -o sizes --ratios 0.2 0.4 --methods pgsvd svd-llm --tasks arc_easy",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser)
    add_folder(
        parser,
        "folder of pareto.html, .json and .svg, and of the calibration, which compress --calibration can use; "
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
    add_measurement(parser)
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


def run(arguments: argparse.Namespace) -> int:
    """Measure all sizes and write the page; returns the exit status and raises PgsvdError."""
    _check(arguments)
    start = time.monotonic()
    with refusals_named(arguments.output_dir):
        found = _Results(arguments.output_dir, _request(arguments))
        _measure(arguments, found)
        _write(arguments.output_dir, found)
    print(f"wrote {arguments.output_dir / 'pareto.html'} after {time.monotonic() - start:.0f} s")
    print(f"compress one of them:  {_compress_line(arguments)}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before any model is loaded; raises InputError."""
    from pgsvd_vllm.evaluation.tasks import check_tasks
    from pgsvd_vllm.format.latency_table import read_latencies

    check_measurement(arguments)
    arguments.ratios, arguments.methods = sorted(set(arguments.ratios)), list(dict.fromkeys(arguments.methods))
    for ratio in arguments.ratios:
        if not 0 < ratio < 1:
            raise InputError(f"--ratios {ratio}: must be between 0 and 1")
    check_tasks(arguments.tasks, arguments.limit)
    arguments.table = None if arguments.costs is None else read_latencies(arguments.costs)


def _request(arguments: argparse.Namespace) -> dict[str, str]:
    """Option -> hash of its value, of those that the measured values depend on."""
    names = (*CALIBRATED_BY, *JUDGED_BY, "tasks", "limit")
    return request_of({**texts_of(arguments, names), "costs": repr(arguments.table)})


def _compress_line(arguments: argparse.Namespace) -> str:
    """The command that compresses with the same calibration."""
    parts = ["pgsvd-vllm", "compress", arguments.model, "-o", "DIR", "--ratio", "R"]
    for name in arguments.dataset or ():
        parts += ["--dataset", name]
    defaults: dict[str, Any] = {
        "revision": None,
        "text_column": None,
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


class _Results(Measured):
    """The measured values, kept in pareto.json after every case.

    Args:
        folder: of the file, created if it is missing.
        request: that the values are for.

    Raises:
        InputError: the folder holds values for another request.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, request: dict[str, str]) -> None:
        super().__init__(folder / "pareto.json", request, {"cases": {}})

    def has(self, case: Case) -> bool:
        """Whether a case is measured."""
        return _key(case) in self.values["cases"]

    def put(self, case: Case, row: dict[str, Any]) -> None:
        """Keep the values of a case."""
        self.values["cases"][_key(case)] = row
        self.save()

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
    from pgsvd_vllm.offline.compress import with_text
    from pgsvd_vllm.offline.model.hub import public_name
    from pgsvd_vllm.offline.output.report import data_name
    from pgsvd_vllm.offline.planning.prepare import open_state, prepare
    from pgsvd_vllm.offline.settings import MEASURED
    from pgsvd_vllm.offline.sweep.run import gemm_time, sweep

    options = calibration_options(arguments)
    plan = prepare(options, say)
    source = plan.source
    text, windows = held_out_windows(arguments, plan)
    plan = with_text(plan, options, say)
    found.values |= {"model": public_name(arguments.model), "calibration": data_name(plan), "text": text}
    if arguments.table is not None:
        found.values["machine"] = f"{arguments.table.machine}, {arguments.table.tokens} tokens"
    if not found.has(dense):
        value = found.values["dense"] = dense_perplexity(plan, windows, text)
        row = {"method": DENSE, "ratio": 0.0, "removed": 0.0, "bytes": source.weights.nbytes, "perplexity": value}
        time_share = None if arguments.table is None else 1.0
        tasks = _scores(arguments, source.folder)
        found.put(dense, {**row, "multiple": 1.0, "predicted": None, "gemm_time": time_share, "tasks": tasks})
    state = open_state(plan, say)
    try:
        for case, result in sweep(plan, state, todo, say):
            label = f"{case.method} {case.ratio:.1%}"
            if isinstance(result, str):
                say(f"WARNING: {label}: {result.replace('`ratio`', '--ratios')}")
                continue
            value = perplexity_of(state.checkpoint, plan, windows, label)
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
                "tasks": _scores(arguments, state.checkpoint),
            }
            found.put(case, row)
            say(f"{label}: {bytes_text(size)}, perplexity {value:.3f}")
        state.discard()
    finally:
        state.close()


def _scores(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Task -> score of a model in a folder."""
    from pgsvd_vllm.evaluation.tasks import Job, score

    if not arguments.tasks:
        return {}
    job = Job(str(folder), arguments.tasks, "hf", arguments.limit, arguments.device, "", arguments.trust_remote_code)
    return {task: values.mean().item() for task, (_, values) in score(job).items()}
