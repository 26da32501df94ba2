"""Makes the checkpoints of many sizes and methods, one after the other."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.latency_table import LatencyTable
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.compress import Say, calibrate, choose, store_layers, without_uncovered
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.outcome import Choice, CompressResult
from pgsvd_vllm.offline.planning.dose import dose_of, dose_on
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.resources import check_disk, disk_bytes
from pgsvd_vllm.offline.ranks.stored import PLAIN
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import resolve_settings
from pgsvd_vllm.offline.state.work_files import WorkFileError
from pgsvd_vllm.offline.sweep.methods import METHODS, Case


def with_options(plan: Plan, **changes: Any) -> Plan:
    """The plan for other options on the same model and calibration data."""
    options = replace(plan.options, **changes)
    device, dtype = plan.settings.device, plan.settings.compute_dtype
    dose = None if plan.short_of_memory else dose_on(dose_of(options, plan.source, device.type), plan.data.windows)
    settings = replace(resolve_settings(options, device, dtype, dose), kept_tokens=plan.settings.kept_tokens)
    return replace(plan, options=options, settings=settings)


def factored(plan: Plan, state: RunState, say: Say, tokens: Mapping[str, int] | None = None) -> Choice:
    """Choose the ranks and bits of a plan, factor its projections, distill and quantize them as its settings say.

    Args:
        plan: of the case.
        state: of the calibrated run.
        say: called with progress lines.
        tokens: that reach each MoE expert and projector.

    Raises:
        InputError: as of `choose` and `store_layers`.
    """
    choice = choose(plan, state, say, with_front=False)
    store_layers(plan, state, choice.allocation.modules, say)
    return replace(choice, tokens=dict(tokens or {}))


def gemm_time(plan: Plan, modules: Mapping[str, FactoredModule], table: LatencyTable) -> float:
    """The GEMM time of a model's projections over that of the dense ones.

    Args:
        plan: of the model.
        modules: projection -> its row of the module table; dense ones are absent.
        table: latencies of the machine; quantized weights count as those in the table's dtype.

    Raises:
        InputError: the table lacks a shape.
    """
    dense = total = 0.0
    for p in plan.projections.every:
        module = modules.get(p.name, PLAIN)
        dense += table.latency(p.out_features, p.in_features, module.form, None)
        total += table.latency(p.out_features, p.in_features, module.form, None if module.is_dense else module.rank)
    return total / dense


def calibrated(plan: Plan, state: RunState, say: Say) -> tuple[Plan, dict[str, int]]:
    """Calibrate what the state does not hold yet.

    Args:
        plan: of the model and its calibration data, with measured or forward sensitivities.
        state: of the run.
        say: called with progress lines.

    Returns:
        The plan without projections that too few tokens reach, and the tokens of each MoE expert and projector.

    Raises:
        InputError: as of the stages of `compress`.
    """
    check_disk(plan, disk_bytes(plan) - state.used_bytes, state.folder)
    plan.source.weights.check_values(plan.settings.store_dtype or plan.source.weight_dtype)
    calibrate(plan, state)
    return without_uncovered(plan, state, say)


def sweep(plan: Plan, state: RunState, cases: Sequence[Case], say: Say) -> Iterator[tuple[Case, CompressResult | str]]:
    """Calibrate, and write the checkpoint of each case into the state's checkpoint folder, one after the other.

    Args:
        plan: of the model and its calibration data, with measured or forward sensitivities.
        state: of the run.
        cases: to make; those of one size should follow each other.
        say: called with progress lines.

    Yields:
        Each case, and what was written, or why it cannot be made. The folder holds it until the next case.

    Raises:
        InputError: as of the stages of `compress`.
    """
    plan, tokens = calibrated(plan, state, say)
    for case in cases:
        changes = METHODS[case.method]
        # Where gradients do not fit into memory the run measures by forward passes.
        measured = {} if {"sensitivity", "baseline"} & changes.keys() else {"sensitivity": plan.settings.sensitivity}
        own = with_options(plan, ratio=case.ratio, **measured, **changes)
        try:
            result: CompressResult | str = write_checkpoint(own, state, factored(own, state, say, tokens))
        except WorkFileError:
            raise
        except InputError as error:  # no ranks of this size, or factors beyond the dtype: others may work
            result = str(error)
        yield case, result
        shutil.rmtree(state.checkpoint, ignore_errors=True)
