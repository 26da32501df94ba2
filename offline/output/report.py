"""Writes the description of a checkpoint: config.json, the per-module report and the model card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pgsvd_vllm
from pgsvd_vllm.format.card import quality_section
from pgsvd_vllm.format.schema import (
    FORMAT_VERSION,
    LOAD_GUARD,
    QUANT_METHOD,
    QUANTIZED_VERSION,
    REPORT_NAME,
    row_of,
)
from pgsvd_vllm.format.writer import save_config
from pgsvd_vllm.offline.model.companions import without_local_code
from pgsvd_vllm.offline.model.hub import public_name
from pgsvd_vllm.offline.output.messages import quantization_text, rank_rule
from pgsvd_vllm.offline.output.outcome import CompressResult
from pgsvd_vllm.offline.output.recipe import RECIPE_NAME
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.ranks.stored import bits_per_weight
from pgsvd_vllm.offline.settings import FORWARD, MEASURED

METHOD = "pgsvd"
# The name of the removed share in the report, by the unit of the front.
_SHARES = {"parameters": "removed", "latency": "time_removed", "bytes": "bytes_removed"}


def write_config(folder: Path, plan: Plan, result: CompressResult) -> None:
    """Write config.json: that of the base model with the module table (see `format.schema`)."""
    settings, allocation, head = plan.settings, result.choice.allocation, result.choice.lm_head
    table: dict[str, dict[str, Any]] = {name: row_of(module) for name, module in allocation.modules.items()}
    found = {scheme.key: scheme.section() for scheme in allocation.schemes}
    schemes = {"schemes": found} if found else {}
    factored_head = head is not None and bool(head.tensors)
    if head is not None and factored_head:
        table[head.name] = {"rank": head.report.rank, "form": "factors"}
    config: dict[str, Any] = dict(plan.source.config_json)
    if not plan.options.trust_remote_code:
        config = without_local_code(config)
    if settings.store_dtype is not None:
        config["dtype"] = str(settings.store_dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    config["transformers_weights"] = LOAD_GUARD
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": QUANTIZED_VERSION if schemes else FORMAT_VERSION,
        **schemes,
        "modules": table,
        "head": head.name if head is not None and factored_head else None,
        "tensors": result.tensors,
        "method": METHOD,
        "sensitivity": settings.sensitivity,
        "serve_on": plan.options.serve_on,
        "sequential": settings.sequential,
        "baseline": settings.baseline,
        "refine_minutes": None if settings.dose is None else settings.dose.minutes,
        "refine_tokens": None if settings.dose is None else settings.dose.tokens,
        "tolerance": allocation.tolerances,
        "ratio": result.ratios,
        "time_removed": None if allocation.latency_removed is None else round(allocation.latency_removed, 6),
        "base_model": public_name(plan.options.model),
        "base_revision": revision_of(plan.source.folder),
        "calibration": {"name": data_name(plan), "tokens": plan.data.tokens, "sha256": plan.data.sha256},
        "tool_version": pgsvd_vllm.__version__,
        "command": plan.options.command,
    }
    save_config(folder, config)


def data_name(plan: Plan) -> str:
    """The names of the calibration data sets; files and folders without their path."""
    return " + ".join(public_name(part) for part in plan.data.name.split(" + "))


def revision_of(folder: Path) -> str | None:
    """The commit of a snapshot folder in a hub cache; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def write_report(folder: Path, plan: Plan, result: CompressResult) -> None:
    """Write the per-module report and, if sensitivities were measured, the Pareto front.

    Each point of the front has the removed share of the parameters (`removed`), of the GEMM latency (`time_removed`) or
    of the bytes (`bytes_removed`), and the predicted loss: `loss_nats` in nats per token from gradients, or
    `stream_error` as a share of the residual stream's energy from forward passes.
    """
    front = result.choice.front
    share = _SHARES["parameters" if front is None else front.unit]
    predicted = "stream_error" if plan.settings.sensitivity == FORWARD else "loss_nats"
    report = {
        "modules": [asdict(module) for module in result.modules],
        "parameters": {"before": result.parameters_before, "after": result.parameters_after},
        "tokens": result.choice.tokens,
        "front": [] if front is None else [{share: r, predicted: x} for r, x in front.summary(0.01)],
    }
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_model_card(folder: Path, plan: Plan, result: CompressResult) -> None:
    """Write README.md, the model card: the checkpoint's origin and the command that serves it."""
    removed, base = result.ratios, public_name(plan.options.model)
    factored = sum(module.rank is not None for module in result.modules)
    pooling = " --runner pooling" if result.is_dual_encoder else ""
    modules = result.choice.allocation.modules
    stored = bits_per_weight(plan.projections.every, modules, plan.itemsizes)
    bits = f", {stored:.2f} bits per weight" if result.choice.allocation.schemes else ""
    origin = f"base_model: {base}\n" if base.count("/") == 1 else ""  # the hub takes ids alone
    (folder / "README.md").write_text(
        f"""---
{origin}library_name: vllm
tags: [pgsvd, low-rank, compressed]
---

# {Path(base).name}, {removed["linear"]:.0%} of the projections' parameters removed{bits}

{factored} of {len(result.modules)} projections are stored as two low-rank matrices (PGSVD, arXiv 2510.05544).
The whole model has {result.parameters_after / 1e6:.1f} M parameters, {removed["total"]:.1%} fewer than the
{result.parameters_before / 1e6:.1f} M of its base.

Serve it with vLLM and the pgsvd-vllm plugin:

    pip install pgsvd-vllm
    vllm serve DIR --load-format pgsvd{pooling}

With transformers, run `import pgsvd_vllm.hf` first; otherwise loading stops with an error.

## Quality

{quality_section(_unmeasured(plan, result))}

Text unlike the calibration text loses more. The base model's licence and limitations apply.

## How it was made

| | |
|---|---|
| ranks from | {rank_rule(plan.settings, result.choice.allocation)} |
| quantization | {quantization_text(result.choice.allocation)} |
| calibration | {data_name(plan)}, {plan.data.tokens} tokens, sha256 {plan.data.sha256[:16]} |
| made by | pgsvd-vllm {pgsvd_vllm.__version__} |
| command | `{plan.options.command}` |
| recipe | [{RECIPE_NAME}]({RECIPE_NAME}), for `pgsvd-vllm compress MODEL -o DIR --recipe {RECIPE_NAME}` |
""",
        encoding="utf-8",
    )


def _unmeasured(plan: Plan, result: CompressResult) -> str:
    """What the card says of the quality before `evaluate` has measured it."""
    loss = result.choice.allocation.loss
    predicted = ""
    if loss is not None and plan.settings.sensitivity == MEASURED:
        later = " and distillation" if plan.settings.dose is not None else ""
        before = f", before the error-aware fit{later}" if plan.settings.sequential else ""
        predicted = f"Predicted loss on the calibration text: {loss:.3g} nats per token{before}.\n"
    return f"""{predicted}Not measured yet. Measure it, and put the table here, with:

    pgsvd-vllm evaluate DIR --against BASE --json quality.json
    pgsvd-vllm report DIR --evaluation quality.json
"""
