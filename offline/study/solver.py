"""How alternating least squares, the paper's solver, compares with the exact solution: errors by sweeps, and time."""

import time
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.factors.solvers import als, closed_form, relative_error
from pgsvd_vllm.offline.linalg import naming
from pgsvd_vllm.offline.study.rows import SOLVER, Row
from pgsvd_vllm.offline.study.study import Study

SWEEPS = (1, 2, 4, 8, 16)
# Bars: excess error over the exact optimum at the solver's own stop and after more sweeps, and the largest rise of the
# error between two sweeps.
STOP_BAR, LONG_BAR, RISE_BAR = 0.005, 0.001, 1e-9
# Below this relative error of the optimum, rounding in the solvers' float64 sums is all that would be compared.
LEAST_ERROR = 1e-6
MEAN, WORST = "mean excess error", "worst excess error"


def solved(study: Study, known: Collection[str], keep: Callable[[str, dict[str, Any]], None]) -> list[str]:
    """Solve every n-th projection with both solvers at the ranks of one tolerance.

    Args:
        study: with the calibration.
        known: projections that were solved in an earlier run.
        keep: called with the name of each solved projection and its values, as of `_compared`.

    Returns:
        The names of all projections that are compared, those of `known` included.

    Raises:
        ChoiceError: the ranks cannot remove the study's share.
        InputError: no projection has an error that could be compared.
    """
    ranks, profiles = study.uniform(study.ratio).ranks, study.profiles
    picked = [name for name, rank in ranks.items() if float(profiles[name][rank]) > LEAST_ERROR][:: study.every]
    if not picked:
        raise InputError(f"`ratio` {study.ratio}: every factored projection is exact at its rank; take a larger share")
    for index, row in enumerate(study.plan.projections.layers):
        todo = [p for p in row if p.name in picked and p.name not in known]
        data = study.state.load_layer(index) if todo else None
        for p in todo:
            assert data is not None
            gram = data.grams[data.leader[p.name]].double(study.plan.settings.device)
            rank = ranks[p.name]
            with naming(p.name):
                keep(p.name, _compared(study.weight(p), gram, rank, float(profiles[p.name][rank])))
    return picked


def _compared(weight: torch.Tensor, gram: torch.Tensor, rank: int, certificate: float) -> dict[str, Any]:
    """Both solvers on one projection.

    Args:
        weight: W, float64 [out, in].
        gram: C, float64 [in, in].
        rank: of the factors.
        certificate: error at this rank by the error profile, which the solver's own stop relies on.

    Returns:
        `excess`: relative excess of the error over the optimum after each of SWEEPS. `stop`, `long`: the same at the
        solver's own stop and after more sweeps. `rise`: largest rise of the error between two sweeps. `exact`, `als`:
        seconds of the exact solution and of the last of SWEEPS.
    """
    start = time.perf_counter()
    optimum = closed_form(weight, gram, rank).errors[-1]
    exact = time.perf_counter() - start
    start = time.perf_counter()
    errors = als(weight, gram, rank, optimum, tolerance=0.0, max_sweeps=max(SWEEPS)).errors
    seconds = time.perf_counter() - start
    found = als(weight, gram, rank, certificate)
    more = als(weight, gram, rank, certificate, tolerance=LONG_BAR)
    return {
        "excess": [errors[min(n, len(errors) - 1)] / optimum - 1 for n in SWEEPS],
        "stop": relative_error(weight, gram, found.u @ found.v) / optimum - 1,
        "long": relative_error(weight, gram, more.u @ more.v) / optimum - 1,
        "rise": max([b - a for a, b in pairwise(more.errors)], default=0.0),
        "exact": exact,
        "als": seconds,
    }


def solver_rows(values: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Excess error by sweeps, seconds, and the bars.

    Args:
        values: projection -> its values, as of `_compared`.
    """
    all_of = list(values.values())
    count = len(all_of)
    rows: list[Row] = []
    for place, n in enumerate(SWEEPS):
        excess = [one["excess"][place] for one in all_of]
        case = f"ALS, {n} sweep{'s' if n > 1 else ''}"
        rows.append(Row(SOLVER, f"{case}, {MEAN} of {count} projections", sum(excess) / count, MEAN, n))
        rows.append(Row(SOLVER, f"{case}, {WORST} of {count} projections", max(excess), WORST, n))
    rows.append(Row(SOLVER, "exact solution, seconds", sum(one["exact"] for one in all_of)))
    rows.append(Row(SOLVER, f"ALS, {max(SWEEPS)} sweeps, seconds", sum(one["als"] for one in all_of)))
    for key, case, bar in (
        ("stop", "ALS, excess error at its own stop, worst", STOP_BAR),
        ("long", "ALS, excess error after more sweeps, worst", LONG_BAR),
        ("rise", "ALS, largest rise of the error between sweeps", RISE_BAR),
    ):
        rows.append(Row(SOLVER, case, max(0.0, *(one[key] for one in all_of)), bar=bar))
    return rows
