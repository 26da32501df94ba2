"""Ranks and solver apart: models of one size by three rules for ranks and two solvers, made one after the other."""

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import choose, store_layers
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.outcome import Choice
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.settings import MEASURED, UNIFORM
from pgsvd_vllm.offline.state.work_files import WorkFileError
from pgsvd_vllm.offline.study.rows import ABLATION, Row
from pgsvd_vllm.offline.study.stages import Seconds, since
from pgsvd_vllm.offline.study.study import FORM, Study
from pgsvd_vllm.offline.sweep.run import with_options

# Rule -> the options that select it. All are stored in one form and factored in one step, without refinement.
RULES: dict[str, dict[str, Any]] = {
    "uniform ratio": {"baseline": "svd-llm"},
    "one tolerance": {"sensitivity": UNIFORM},
    "measured losses": {"sensitivity": MEASURED},
}
# Solver -> the options that select it for any ranks. Both minimise the same error: that of the dense model's outputs.
ALS, EXACT = "ALS", "exact solution"
SOLVERS: dict[str, dict[str, Any]] = {ALS: {"sensitivity": UNIFORM}, EXACT: {"baseline": "svd-llm"}}
ONE_STEP: dict[str, Any] = {"form": FORM, "sequential": False, "refine": 0.0}
REMOVED = "removed share"


def case_of(rule: str, solver: str) -> str:
    """The case of a row: a rule's and a solver's model."""
    return f"{rule}, {solver}, perplexity, multiple of dense"


def ablation(
    study: Study,
    known: Collection[str],
    judge: Callable[[Path, str], float | None],
    keep: Callable[[list[Row], dict[str, Seconds]], None],
) -> None:
    """Make and measure every model that is not known yet.

    Args:
        study: with the calibration.
        known: cases that were measured in an earlier run.
        judge: returns the quality of the model in a folder, which has a label for messages; None if it is not finite.
        keep: called with the rows of each model, or the seconds of each stage that made it.

    Raises:
        ChoiceError: no ranks of a rule remove the study's share.
        InputError: a file of the state is damaged.
    """
    for rule in RULES:
        if all(case_of(rule, solver) in known for solver in SOLVERS):
            continue
        choice, seconds = _chosen(study, rule)
        keep([Row(ABLATION, f"{rule}, {REMOVED}", choice.allocation.removed, REMOVED, rule)], seconds)
        for solver in SOLVERS:
            if case_of(rule, solver) in known:
                continue
            value = None
            try:
                keep([], {f"factoring by {solver}, {rule}": _make(study, rule, solver, choice)})
                value = judge(study.state.checkpoint, f"{rule}, {solver}")
            except WorkFileError:
                raise
            except InputError as error:  # factors beyond the dtype: other models may work
                study.say(f"WARNING: {rule}, {solver}: {error}")
            shutil.rmtree(study.state.checkpoint, ignore_errors=True)
            keep([Row(ABLATION, case_of(rule, solver), value, solver, rule)], {})


def time_ranks(study: Study) -> dict[str, Seconds]:
    """The seconds that each rule takes to choose ranks; raises ChoiceError as `ablation`."""
    return {stage: seconds for rule in RULES for stage, seconds in _chosen(study, rule)[1].items()}


def _chosen(study: Study, rule: str) -> tuple[Choice, dict[str, Seconds]]:
    """The ranks by a rule, and how long it took to read the spectra and choose."""
    start = time.perf_counter()
    choice = choose(_with(study, RULES[rule]), study.state, study.say, with_front=False)
    return choice, {f"ranks by {rule}": Seconds(time.perf_counter() - start)}


def _with(study: Study, options: dict[str, Any]) -> Plan:
    """The plan of a rule or a solver."""
    return with_options(study.plan, ratio=study.ratio, **ONE_STEP, **options)


def _make(study: Study, rule: str, solver: str, choice: Choice) -> Seconds:
    """Factor by a solver and write the checkpoint, which is described by its rule; returns the seconds of factoring."""
    state, start = study.state, time.time()
    store_layers(_with(study, SOLVERS[solver]), state, choice.allocation.modules, study.say)
    seconds = since(start, time.time(), state.folder.glob("factors-*/*.safetensors"))
    write_checkpoint(_with(study, RULES[rule]), state, choice)
    return seconds
