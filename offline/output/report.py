"""What a checkpoint says of itself: config.json's section, the per-module report, the model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pgsvd_vllm
from pgsvd_vllm.format.schema import FORMAT_VERSION, LOAD_GUARD, QUANT_METHOD, REPORT_NAME
from pgsvd_vllm.offline.output.messages import rank_rule
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.run.plan import Plan

METHOD = "pgsvd"


def ratios(plan: Plan, allocation: Allocation, after: int) -> dict[str, float]:
    """Share of parameters removed: of the projections, and of the whole model."""
    return {"linear": round(allocation.removed, 6), "total": round(1 - after / plan.total_parameters, 6)}


def write_config(
    folder: Path, plan: Plan, allocation: Allocation, after: int, tensors: int, head: ModuleReport | None
) -> None:
    """config.json: the base model's, with the module table.

    Args:
        head: of the output head, if it is factored.
    """
    table = {name: {"rank": rank, "form": plan.form} for name, rank in allocation.ranks.items()}
    if head is not None:
        table[head.name] = {"rank": head.rank, "form": "factors"}
    config: dict[str, Any] = dict(plan.source.config_json)
    if plan.store_dtype is not None:
        config["dtype"] = str(plan.store_dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    config["transformers_weights"] = LOAD_GUARD
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "modules": table,
        "head": None if head is None else head.name,
        "tensors": tensors,
        "method": METHOD,
        "sensitivity": plan.sensitivity,
        "sequential": plan.sequential,
        "baseline": plan.options.baseline,
        "refine_minutes": plan.options.refine,
        "tolerance": allocation.tolerances,
        "ratio": ratios(plan, allocation, after),
        "time_removed": None if allocation.time is None else round(allocation.time, 6),
        "base_model": plan.options.model,
        "base_revision": _revision(plan.source.folder),
        "calibration": {
            "name": plan.data_name,
            "tokens": plan.tokens,
            "sha256": plan.data_sha256,
        },
        "tool_version": pgsvd_vllm.__version__,
        "command": plan.options.command,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _revision(folder: Path) -> str | None:
    """The commit of a hub snapshot folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def write_description(
    folder: Path,
    plan: Plan,
    allocation: Allocation,
    front: LossFront | None,
    modules: Sequence[ModuleReport],
    after: int,
    tokens: dict[str, int],
) -> None:
    """The per-module report, with the front of sizes and losses where it was measured, and the model card.

    Args:
        tokens: of the calibration data that reached each projection of an expert or a projector.
    """
    share = "time_removed" if front is not None and front.by_time else "removed"
    report = {
        "modules": [asdict(m) for m in modules],
        "parameters": {"before": plan.total_parameters, "after": after},
        "tokens": tokens,
        "front": [] if front is None else [{share: r, "loss": loss} for r, loss in front.summary(0.01)],
    }
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    removed = ratios(plan, allocation, after)
    factored = sum(module.rank is not None for module in modules)
    (folder / "README.md").write_text(
        f"""---
base_model: {plan.options.model}
library_name: vllm
tags: [pgsvd, low-rank, compressed]
---

# {Path(plan.options.model).name}, {removed["linear"]:.0%} of the projections' parameters removed

{factored} of {len(modules)} projections are stored as two low-rank matrices (PGSVD, arXiv 2510.05544).
The whole model has {after / 1e6:.1f} M parameters, {removed["total"]:.1%} fewer than the
{plan.total_parameters / 1e6:.1f} M of its base.

Serve it with vLLM and the pgsvd-vllm plugin:

    pip install pgsvd-vllm
    vllm serve DIR --load-format pgsvd

In transformers, `import pgsvd_vllm.hf` comes first; without it loading stops with an error.

| | |
|---|---|
| ranks from | {rank_rule(plan, allocation)} |
| calibration | {plan.data_name}, {plan.tokens} tokens, sha256 {plan.data_sha256[:16]} |
| made by | pgsvd-vllm {pgsvd_vllm.__version__} |
| command | `{plan.options.command}` |
""",
        encoding="utf-8",
    )
