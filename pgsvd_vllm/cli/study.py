"""Repeat the claims of the PGSVD paper (arXiv 2510.05544) on a model: tables and charts on one HTML page.

front: is one uniform tolerance on the Pareto front? solver: alternating least squares beside the exact solution.
sensitivity: what an error costs in each kind of projection. ablation: perplexity by rules for ranks and by solvers.
sharing: one down factor for projections of one input. forward: ranks without gradients. time: seconds of each stage.

The exit status is 1 where a value misses its bar. Needs pip install 'pgsvd-vllm[plot]'.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.cli.log import say
from pgsvd_vllm.cli.measured import (
    CALIBRATED_BY,
    JUDGED_BY,
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
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.study.rows import (
    ABLATION,
    FORWARD,
    FRONT,
    QUESTIONS,
    SENSITIVITY,
    SHARING,
    SOLVER,
    TIME,
    Row,
)

if TYPE_CHECKING:
    import torch

    from pgsvd_vllm.offline.planning.plan import Plan
    from pgsvd_vllm.offline.study.stages import Seconds
    from pgsvd_vllm.offline.study.study import Study

RATIO = 0.4
# Removed shares for questions about the front, and the solvers' n-th projections; with --quick the second ones.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.4, 0.6)
EVERY = 2, 10

EXAMPLES = (
    "study MODEL -o claims",
    "study MODEL -o claims --quick --questions front solver --dataset python-docs",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser)
    add_folder(
        parser,
        "folder of study.html and .json, and of the calibration, which pareto can share and compress "
        "--calibration can use; the same command continues there after an interruption, or with more questions",
    )
    parser.add_argument(
        "--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="to answer (default: all)"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=RATIO,
        metavar="R",
        help=f"share of the projections' parameters to remove where a question has one size (default {RATIO})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="solve every tenth projection instead of every second, and fewer shares of the front",
    )
    add_measurement(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the page; returns the exit status and raises PgsvdError."""
    check_measurement(arguments)
    if not 0 < arguments.ratio < 1:
        raise InputError(f"--ratio {arguments.ratio}: must be between 0 and 1")
    start = time.monotonic()
    with refusals_named(arguments.output_dir):
        request = request_of(texts_of(arguments, (*CALIBRATED_BY, *JUDGED_BY, "ratio", "quick")))
        found = _Results(arguments.output_dir, request)
        _measure(arguments, found)
        missed = _write(arguments, found)
    print(f"wrote {arguments.output_dir / 'study.html'} after {time.monotonic() - start:.0f} s")
    return 1 if missed else 0


class _Results(Measured):
    """The rows of every finished question, kept in study.json.

    `solved` holds the solver's values of each projection and `seconds` those of each stage, from which rows are made.

    Args:
        folder: of the file, created if it is missing.
        request: that the values are for.

    Raises:
        InputError: the folder holds values for another request.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, request: dict[str, str]) -> None:
        super().__init__(folder / "study.json", request, {"finished": [], "rows": [], "solved": {}, "seconds": {}})

    def lacks(self, question: str) -> bool:
        """Whether a question is not finished."""
        return question not in self.values["finished"]

    def cases(self, question: str) -> set[str]:
        """The cases of a question that have rows."""
        return {row["case"] for row in self.values["rows"] if row["question"] == question}

    def put(self, rows: list[Row]) -> None:
        """Keep rows, in place of older ones of the same question and case."""
        new = {(row.question, row.case): row.as_json() for row in rows}
        kept = [row for row in self.values["rows"] if (row["question"], row["case"]) not in new]
        self.values["rows"] = sorted([*kept, *new.values()], key=lambda row: QUESTIONS.index(row["question"]))
        self.save()

    def finish(self, question: str) -> None:
        """Record that a question has all of its rows."""
        self.values["finished"].append(question)
        self.save()

    def took(self, seconds: "dict[str, Seconds]") -> None:
        """Keep the seconds of stages; those of a stage that was found finished are kept as they are."""
        for stage, one in seconds.items():
            if one.value is not None or stage not in self.values["seconds"]:
                self.values["seconds"][stage] = asdict(one)
        self.save()

    def put_time(self) -> None:
        """Make the rows of the stages anew."""
        from pgsvd_vllm.offline.study.stages import time_rows

        self.values["rows"] = [row for row in self.values["rows"] if row["question"] != TIME]
        self.put(time_rows(self.values["seconds"]))


def _measure(arguments: argparse.Namespace, found: _Results) -> None:
    """Answer the questions that are not answered yet; raises PgsvdError as `compress`."""
    todo = [name for name in QUESTIONS if name in arguments.questions and found.lacks(name)]
    if not todo:
        return
    from pgsvd_vllm.offline.compress import with_text
    from pgsvd_vllm.offline.model.hub import public_name
    from pgsvd_vllm.offline.output.report import data_name
    from pgsvd_vllm.offline.planning.prepare import open_state, prepare
    from pgsvd_vllm.offline.study.stages import timed_calibration
    from pgsvd_vllm.offline.study.study import study_of

    options = calibration_options(arguments)
    plan = prepare(options, say)
    _check_gradients(plan)
    held_out = held_out_windows(arguments, plan) if ABLATION in todo else None
    if held_out is not None and "dense" not in found.values:
        found.values |= {"text": held_out[0], "dense": dense_perplexity(plan, held_out[1], held_out[0])}
        found.save()
    plan = with_text(plan, options, say)
    found.values |= {"model": public_name(arguments.model), "calibration": data_name(plan)}
    found.values["projections"] = len(plan.projections.flat)
    state = open_state(plan, say)
    try:
        plan, seconds = timed_calibration(plan, state, say)
        found.took(seconds)
        quick = arguments.quick
        study = study_of(plan, state, RATIOS[quick], arguments.ratio, EVERY[quick], say)
        for question in todo:
            say(f"{question} ...")
            _answer(question, study, found, None if held_out is None else held_out[1])
            found.finish(question)
        state.discard()
    finally:
        state.close()


def _check_gradients(plan: "Plan") -> None:
    """Refuse a plan without loss gradients; raises InputError."""
    from pgsvd_vllm.offline.settings import MEASURED

    if plan.settings.sensitivity != MEASURED:
        raise InputError(
            f"MODEL {plan.options.model}: study needs loss gradients, which do not fit into the memory that is free; "
            "free some, or take a machine with more"
        )


def _answer(question: str, study: "Study", found: _Results, windows: "torch.Tensor | None") -> None:
    """Measure one question and keep its rows.

    Args:
        question: one of QUESTIONS.
        study: with the calibration.
        found: receives the rows, those of interrupted questions one by one.
        windows: for perplexity, int64 [count, length]; None where no question needs them.
    """
    from pgsvd_vllm.offline.study import ablation, front, sensitivity, sharing, solver

    if question == FRONT:
        found.put(front.front_rows(study))
    elif question == SOLVER:
        values = found.values["solved"]

        def keep(name: str, one: dict[str, Any]) -> None:
            values[name] = one
            found.save()

        picked = solver.solved(study, values, keep)
        found.put(solver.solver_rows({name: values[name] for name in picked}))
    elif question == SENSITIVITY:
        found.put(sensitivity.sensitivity_rows(study))
    elif question == ABLATION:
        assert windows is not None

        def judge(folder: Path, label: str) -> float | None:
            value = perplexity_of(folder, study.plan, windows, label) / found.values["dense"]
            return value if math.isfinite(value) else None

        found.put([Row(ABLATION, "dense, perplexity", found.values["dense"])])

        def keep_model(rows: list[Row], seconds: "dict[str, Seconds]") -> None:
            found.took(seconds)
            found.put(rows)

        ablation.ablation(study, found.cases(ABLATION), judge, keep_model)
    elif question == SHARING:
        found.put(sharing.sharing_rows(study))
    elif question == FORWARD:
        found.put(front.forward_rows(study))
    else:
        found.took(ablation.time_ranks(study))


def _write(arguments: argparse.Namespace, found: _Results) -> list[dict[str, Any]]:
    """Write the page and print the findings; returns the rows that miss their bar."""
    from pgsvd_vllm.report.study_report import FINDINGS, study_report

    if not found.lacks(TIME):
        found.put_time()
    values, rows = found.values, found.values["rows"]
    facts = [("calibrated on", str(values["calibration"]))]
    if "dense" in values:
        facts.append(("perplexity on", f"{values['text']}, dense {values['dense']:.3f}"))
    facts.append(("projections", f"{values['projections']}, {arguments.ratio:.0%} removed where there is one size"))
    page = study_report(f"{values['model']}: the claims of the PGSVD paper", facts, rows, arguments.ratio)
    (arguments.output_dir / "study.html").write_text(page, encoding="utf-8")
    for question in QUESTIONS:
        own = [row for row in rows if row["question"] == question]
        if own:
            print(f"{question}: {FINDINGS[question](own, arguments.ratio)}")
    missed = [row for row in rows if not row.get("ok", True)]
    for row in missed:
        print(f"MISSED  {row['question']}: {row['case']} is {row['value']:.4g}, the bar is {row['bar']:g}")
    return missed
