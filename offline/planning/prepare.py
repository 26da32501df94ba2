"""Makes the plan of a request that fits the machine, and opens the state of its run."""

import hashlib
import json
from collections.abc import Callable

from pgsvd_vllm.offline.model.projection import LM_HEAD
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.resources import fit_into_memory
from pgsvd_vllm.offline.ranks.pareto import check_latency
from pgsvd_vllm.offline.run_state import (
    CALIBRATION_VERSION,
    LAYERS,
    RunState,
    measured_layers,
    partial_folder,
    recorded_settings,
)
from pgsvd_vllm.offline.settings import FORWARD, MEASURED


def prepare(options: CompressOptions, say: Callable[[str], None]) -> Plan:
    """The plan of a request, with every setting resolved.

    A resumed run measures sensitivities as when it began, regardless of the memory that is free now.

    Args:
        options: the request.
        say: called with one line if gradients do not fit in memory.

    Raises:
        InputError: as of `make_plan`, or no ranks reach the requested latency.
        CheckpointError: a file of the model is missing or damaged.
    """
    plan = make_plan(options)
    if plan.latencies is not None:
        check_latency(plan.projections, plan.target)
    if options.sensitivity is None and plan.settings.sensitivity == MEASURED:
        begun = _begun(options, len(plan.projections.layers))
        if begun is not None:
            return plan.with_sensitivity(begun)
    return fit_into_memory(plan, say)


def _begun(options: CompressOptions, layers: int) -> str | None:
    """The sensitivity method that earlier work of this run, or the calibration folder, has settled."""
    if options.calibration is not None and measured_layers(options.calibration, MEASURED) == layers:
        return MEASURED  # nothing is left to measure
    if not options.resume:
        return None
    recorded = recorded_settings(options.output).get("sensitivity")
    if recorded in (MEASURED, FORWARD):
        return recorded
    # Earlier versions recorded nothing.
    folder = options.calibration or partial_folder(options.output) / LAYERS
    return next((kind for kind in (MEASURED, FORWARD) if measured_layers(folder, kind)), None)


def open_state(plan: Plan) -> RunState:
    """Create or reopen the folder of the plan's run; raises InputError as `RunState`."""
    options = plan.options
    settings = {"sensitivity": plan.settings.sensitivity}
    return RunState(options.output, identity(plan), settings, options.resume, options.calibration)


def identity(plan: Plan) -> dict[str, str]:
    """Name -> value of everything that calibration depends on; runs with equal values can share calibration results."""
    source = plan.source
    files = sorted({info.file for info in source.weights.tensors.values()})
    stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {
        "model": str(source.folder.resolve()),
        "weights": hashlib.sha256(json.dumps([stamp, source.config_json]).encode()).hexdigest(),
        "calibration text": plan.data.sha256,
        "dtype": str(plan.settings.compute_dtype),
        "ignore": " ".join(plan.options.ignore),
        "include": " ".join(kind for kind in plan.options.include if kind != LM_HEAD),
        "program version": CALIBRATION_VERSION,
    }
