"""Seconds of the stages of a run, and which of them continued the work of an earlier run."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import MEASURED
from pgsvd_vllm.offline.study.rows import TIME, Row
from pgsvd_vllm.offline.study.study import Say
from pgsvd_vllm.offline.sweep.run import calibrated

CALIBRATION, GRADIENTS = "calibration", "gradients"
SECONDS, RESUMED = "seconds", "resumed"
FOUND, REST = "all of it was found finished", "the rest of an earlier run"
# Files are stamped by a clock that is this much behind at most.
_BEHIND = 0.05


@dataclass(frozen=True)
class Seconds:
    """How long a stage took.

    Attributes:
        value: seconds in the run that measured it; None if all of it was found finished.
        resumed: whether an earlier run had done some of it.
    """

    value: float | None
    resumed: bool = False


def since(start: float, end: float, files: Iterable[Path]) -> Seconds:
    """The seconds of a stage that writes a file for each layer.

    Args:
        start, end: of the stage, by `time.time`.
        files: that it has written, or found.
    """
    times = [path.stat().st_mtime for path in files]
    old = [written < start - _BEHIND for written in times]
    return Seconds(None if times and all(old) else end - start, any(old))


def timed_calibration(plan: Plan, state: RunState, say: Say) -> tuple[Plan, dict[str, Seconds]]:
    """Calibrate as `sweep` does; the plan without uncovered projections, and the seconds of the two stages.

    Where gradients are missing the forward pass runs again for them, which then counts as theirs.

    Args:
        plan: of the run, with sensitivities measured by gradients.
        state: of the run.
        say: called with progress lines.

    Raises:
        InputError: as of `calibrated`.
    """
    start = time.time()
    plan, _ = calibrated(plan, state, say)
    end = time.time()
    forward = list(state.layers.glob("*[0-9].safetensors"))
    # The last file of the forward pass is written where the backward pass begins.
    middle = min(max([start, *(path.stat().st_mtime for path in forward)]), end)
    backward = state.layers.glob(f"*.{MEASURED}.safetensors")
    gradients = since(start, end, backward)
    if gradients.value is not None:
        gradients = Seconds(end - middle, gradients.resumed)
    return plan, {CALIBRATION: since(start, middle, forward), GRADIENTS: gradients}


def time_rows(values: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The seconds of each stage.

    Args:
        values: stage -> the fields of its `Seconds`.
    """
    rows: list[Row] = []
    for stage, one in values.items():
        resumed = f", resumed: {FOUND if one['value'] is None else REST}" if one["resumed"] else ""
        rows.append(Row(TIME, f"{stage}{resumed}, seconds", one["value"], RESUMED if resumed else SECONDS, stage))
    return rows
