"""Writes the compressed checkpoint: factors, dense tensors, config, report and model card."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.writer import TensorWriter
from pgsvd_vllm.offline.output.report import write_config, write_description
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.pareto import LossFront
from pgsvd_vllm.offline.records import LMHeadFactors, ModuleReport
from pgsvd_vllm.offline.run.plan import Plan
from pgsvd_vllm.offline.run.state import RunState

COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


@dataclass(frozen=True)
class CompressResult:
    """What was written.

    Attributes:
        output: the folder.
        allocation: tolerances and ranks.
        modules: one entry a projection, factored or dense.
        parameters_before, parameters_after: of the whole model.
        compares: whether it compares images with texts, and is served to embed them.
    """

    output: Path
    allocation: Allocation
    modules: list[ModuleReport]
    parameters_before: int
    parameters_after: int
    compares: bool


def write_checkpoint(
    plan: Plan,
    workspace: RunState,
    allocation: Allocation,
    front: LossFront | None,
    tokens: dict[str, int] | None = None,
    head: LMHeadFactors | None = None,
) -> CompressResult:
    """Write the factors and everything else, and describe the result; `tokens` are those of `token_counts`."""
    folder = workspace.begin_checkpoint()
    writer = TensorWriter(folder)
    modules: list[ModuleReport] = []
    after = 0
    for index, row in enumerate(plan.projections):
        factors = workspace.load_factors(index)
        for p in row:
            if p.name not in allocation.ranks:
                modules.append(ModuleReport(p.name, p.out_features, p.in_features, None, 0.0, 0.0, 0))
                continue
            for suffix, tensor in factors.tensors[p.name].items():
                writer.add(f"{p.name}.{suffix}", tensor)
                after += tensor.numel()
            modules.append(factors.reports[p.name])
    paths = [p.path for p in plan.flat if p.name in allocation.ranks]
    if head is not None:
        modules.append(head.report)
        if plan.head is not None and head.tensors:
            paths.append(plan.head.path)
        for suffix, tensor in head.tensors.items():
            writer.add(f"{head.name}.{suffix}", tensor)
            after += tensor.numel()
    factored = {stored for path in paths for stored in plan.source.stored_as(f"{path}.weight")}
    for name in plan.source.tensors:
        if name in factored:
            continue
        tensor = plan.source.read(name)
        if plan.store_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(plan.store_dtype)
        writer.add(name, tensor)
        after += tensor.numel()
    writer.close()
    for path in sorted(plan.source.folder.iterdir()):
        if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    small = head.report if head is not None and head.tensors else None
    write_config(folder, plan, allocation, after, writer.count, small)
    write_description(folder, plan, allocation, front, modules, after, tokens or {})
    open_checkpoint(folder)
    return CompressResult(workspace.output, allocation, modules, plan.total_parameters, after, plan.source.compares)
