"""Show what each size of a model costs: one calibration, many sizes, measured perplexity, one HTML page.

Sizes are factored without the error-aware fit and distillation that compress adds, unless --methods has full: a real
compress loses less. Needs pip install 'pgsvd-vllm[plot]'.
"""

import argparse
import json
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.errors import InputError, bytes_text, refusal_of

if TYPE_CHECKING:
    from pgsvd_vllm.offline.sweep import Case

METHODS = ("full", "pgsvd", "uniform", "pifa", "svd-llm", "asvd", "svd")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
DENSE = "dense"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", metavar="MODEL", help="local model folder or Hugging Face id")
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
        choices=METHODS,
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
        "--max-seq-length", type=int, default=1024, metavar="L", help="tokens per window (default 1024)"
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
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples of every task alone")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the calibration (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if available)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Measure all sizes and write the page; returns the exit status and raises PgsvdError."""
    from pgsvd_vllm.report.page import check_libraries
    from pgsvd_vllm.report.sweep_report import front_of, sweep_charts, sweep_report

    _check(arguments)
    check_libraries()
    folder: Path = arguments.output_dir
    start = time.monotonic()
    found = _Results(folder, _request(arguments))
    _measure(arguments, found)
    rows = found.rows(arguments.methods, arguments.ratios)
    title = f"{found.values['model']}: sizes and quality"
    facts = [
        ("calibrated on", str(found.values["calibration"])),
        ("perplexity on", f"{found.values['text']}, dense {found.values['dense']:.3f}"),
    ]
    charts = sweep_charts(rows)
    for name, svg in charts.items():
        (folder / f"pareto-{name}.svg").write_text(svg, encoding="utf-8")
    (folder / "pareto.html").write_text(sweep_report(title, facts, rows, charts), encoding="utf-8")
    front = front_of(rows)
    print(f"{'method':8} {'removed':>8} {'MB':>8} {'x dense':>8}")
    for n, row in enumerate(rows):
        multiple = "failed" if row["multiple"] is None else f"{row['multiple']:.3f}"
        mark = "  on the front" if n in front else ""
        print(f"{row['method']:8} {row['removed']:8.1%} {row['bytes'] / 1e6:8.1f} {multiple:>8}{mark}")
    print(f"wrote {folder / 'pareto.html'} after {time.monotonic() - start:.0f} s")
    given = "".join(f" --dataset {shlex.quote(name)}" for name in arguments.dataset or ())
    print(
        f"compress one of them:  pgsvd-vllm compress {shlex.quote(arguments.model)} -o DIR --ratio R{given} "
        f"--calibration {shlex.quote(str(folder / 'calibration'))}"
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before any model is loaded; raises InputError."""
    for ratio in arguments.ratios:
        if not 0 < ratio < 1:
            raise InputError(f"--ratios {ratio}: must be between 0 and 1")
    if arguments.num_samples < 2:
        raise InputError(f"--num-samples {arguments.num_samples}: must be at least 2")
    if arguments.tasks:
        from pgsvd_vllm.evaluation.tasks import check_tasks

        check_tasks(arguments.tasks)


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the measured values depend on, but for method and size."""
    names = ("model", "dataset", "num_calibration_samples", "max_seq_length", "eval_dataset", "num_samples", "tasks")
    return {name: getattr(arguments, name) for name in (*names, "limit", "seed")}


class _Results:
    """The measured values, kept in pareto.json after every case.

    Args:
        folder: of the file, created if it is missing.
        request: that the values are for.

    Raises:
        InputError: the folder holds values for another request, or cannot be written.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        from pgsvd_vllm.format.reader import read_json

        self._path = folder / "pareto.json"
        self.values: dict[str, Any] = {"request": request, "cases": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output-dir {folder}: cannot be written ({error.strerror})") from None
        if self._path.is_file():
            self.values = read_json(self._path)
            old = self.values.get("request")
            if old != request or not isinstance(self.values.get("cases"), dict):
                changed = [key for key in request if not isinstance(old, dict) or old.get(key) != request[key]]
                raise InputError(
                    f"{self._path}: made with other options ({', '.join(changed)}); choose another --output-dir"
                )

    def has(self, method: str, ratio: float) -> bool:
        """Whether a case is measured."""
        return f"{method} {ratio}" in self.values["cases"]

    def put(self, method: str, ratio: float, row: dict[str, Any]) -> None:
        """Keep the values of a case."""
        self.values["cases"][f"{method} {ratio}"] = row
        self.save()

    def save(self) -> None:
        """Write the file; an interruption leaves it as it was."""
        part = self._path.with_suffix(".writing")
        part.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)

    def rows(self, methods: list[str], ratios: list[float]) -> list[dict[str, Any]]:
        """The rows of the dense model and of the cases that could be made."""
        cases = [self.values["cases"].get(f"{method} {ratio}") for method in methods for ratio in sorted(ratios)]
        return [self.values["cases"][f"{DENSE} 0"], *(row for row in cases if row is not None and "bytes" in row)]


def _measure(arguments: argparse.Namespace, found: _Results) -> None:
    """Measure what is missing; raises PgsvdError as `compress`."""
    todo = [(m, r) for r in sorted(arguments.ratios) for m in arguments.methods if not found.has(m, r)]
    if not todo and found.has(DENSE, 0):
        return
    from safetensors import SafetensorError

    from pgsvd_vllm.evaluation.perplexity import held_out_prose, spread_windows
    from pgsvd_vllm.offline.compress import with_text
    from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents
    from pgsvd_vllm.offline.data.tokens import window_length
    from pgsvd_vllm.offline.model.hub import public_name, resolve_folder
    from pgsvd_vllm.offline.options import CompressOptions
    from pgsvd_vllm.offline.output.report import data_name
    from pgsvd_vllm.offline.planning.prepare import open_state, prepare
    from pgsvd_vllm.offline.sweep import Case, sweep

    folder: Path = arguments.output_dir
    options = CompressOptions(
        model=arguments.model,
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
    plan = prepare(options, print)
    model = resolve_folder(arguments.model, arguments.trust_remote_code)
    tokenizer = load_tokenizer(model, arguments.trust_remote_code)
    length = window_length(plan.source.config, arguments.max_seq_length)
    name, count = arguments.eval_dataset, arguments.num_samples
    documents = read_documents(name, 2 * count * length, tokenizer) if name else [held_out_prose()]
    try:
        windows = spread_windows(tokenizer, documents, count, length)
    except InputError as error:
        raise InputError(f"--eval-dataset {name}: {error}; give more text, or smaller --num-samples") from None
    plan = with_text(plan, options, print)
    found.values["model"], found.values["calibration"] = public_name(arguments.model), data_name(plan)
    found.values["text"] = f"{name or 'docstrings'} ({count} x {length} tokens)"
    if not found.has(DENSE, 0):
        found.values["dense"], tasks = _judge(arguments, model, plan.settings.device, windows, "dense")
        size = plan.source.weights.nbytes
        row = {"method": DENSE, "ratio": 0.0, "removed": 0.0, "bytes": size, "perplexity": found.values["dense"]}
        found.put(DENSE, 0, {**row, "multiple": 1.0, "predicted": None, "tasks": tasks})
    state = open_state(plan, print)
    try:
        for case, result in sweep(plan, state, [Case(m, r) for m, r in todo], print):
            if isinstance(result, str):
                print(f"WARNING: {_label(case)}: {result}")
                found.put(case.method, case.ratio, {"refused": result})
                continue
            value, tasks = _judge(arguments, state.checkpoint, plan.settings.device, windows, _label(case))
            size = sum(file.stat().st_size for file in state.checkpoint.glob("*.safetensors"))
            row = {
                "method": case.method,
                "ratio": case.ratio,
                "removed": result.ratios["linear"],
                "bytes": size,
                "perplexity": value if math.isfinite(value) else None,
                "multiple": value / found.values["dense"] if math.isfinite(value) else None,
                "predicted": result.choice.allocation.loss,
                "tasks": tasks,
            }
            found.put(case.method, case.ratio, row)
            print(f"{_label(case)}: {bytes_text(size)}, perplexity {value:.3f}", flush=True)
        state.discard()
    except (OSError, SafetensorError) as error:
        refused = refusal_of(error)
        if refused is None:
            raise
        raise InputError(f"--output-dir {folder}: {refused}; what is finished is kept, repeat the command") from None
    finally:
        state.close()


def _label(case: "Case") -> str:
    return f"{case.method} {case.ratio:.0%}"


def _judge(
    arguments: argparse.Namespace, folder: Path, device: Any, windows: Any, label: str
) -> tuple[float, dict[str, float]]:
    """Perplexity and task scores of a model in a folder."""
    from pgsvd_vllm.evaluation.models import load_model, release
    from pgsvd_vllm.evaluation.perplexity import perplexity

    model = load_model(folder, device, arguments.trust_remote_code)
    value = perplexity(model, windows, desc=f"perplexity of {label}")
    del model
    release()
    if not arguments.tasks:
        return value, {}
    from pgsvd_vllm.evaluation.tasks import Job, score

    job = Job(str(folder), arguments.tasks, "hf", arguments.limit, arguments.device, "", arguments.trust_remote_code)
    return value, {task: values.mean().item() for task, (_, values) in score(job).items()}
