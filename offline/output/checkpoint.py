"""Writes the compressed checkpoint: factors, dense tensors, and the model's other files."""

import shutil
from pathlib import Path

from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.writer import TensorWriter
from pgsvd_vllm.offline.output.outcome import Choice, CompressResult
from pgsvd_vllm.offline.output.report import write_config, write_model_card, write_report
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.run_state import RunState

# Files of the dense model that the checkpoint gets as they are, and those that it writes itself.
COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
COPIED_FOLDERS = ("additional_chat_templates",)
NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}
REMOTE_CODE_SUFFIX = ".py"


def write_checkpoint(plan: Plan, state: RunState, choice: Choice) -> CompressResult:
    """Write the checkpoint into the state's checkpoint folder and validate it.

    Args:
        plan: of the run.
        state: with the factors of every layer.
        choice: the ranks and the LM head.

    Raises:
        InputError: a tensor of the dense model is not finite, or a file of the state is damaged.
        CheckpointError: the written checkpoint is not valid.
    """
    folder = state.begin_checkpoint()
    writer = TensorWriter(folder)
    ranks, weights, head = choice.allocation.ranks, plan.source.weights, choice.lm_head
    modules: list[ModuleReport] = []
    for index, row in enumerate(plan.projections.layers):
        factors = state.load_factors(index)
        for p in row:
            if p.name not in ranks:
                modules.append(ModuleReport(p.name, p.out_features, p.in_features, None, 0.0, 0.0, 0))
                continue
            for suffix, tensor in factors.tensors[p.name].items():
                writer.add(f"{p.name}.{suffix}", tensor)
            modules.append(factors.reports[p.name])
    paths = [p.path for p in plan.projections.flat if p.name in ranks]
    if head is not None:
        modules.append(head.report)
        if plan.projections.lm_head is not None and head.tensors:
            paths.append(plan.projections.lm_head.path)
        for suffix, tensor in head.tensors.items():
            writer.add(f"{head.name}.{suffix}", tensor)
    factored = {stored for path in paths for stored in weights.stored_as(f"{path}.weight")}
    for name in weights.tensors:
        if name in factored:
            continue
        tensor = weights.read(name)
        if plan.settings.store_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(plan.settings.store_dtype)
        writer.add(name, tensor)
    writer.close()
    copy_companions(plan.source.folder, folder, plan.options.trust_remote_code)
    result = CompressResult(
        state.output, choice, modules, weights.numel, writer.numel, writer.count, plan.source.is_dual_encoder
    )
    write_config(folder, plan, result)
    write_report(folder, plan, result)
    write_model_card(folder, plan, result)
    open_checkpoint(folder)
    return result


def copy_companions(model: Path, folder: Path, trust_remote_code: bool) -> None:
    """Copy the files beside a model's weights: tokenizer, processor, chat templates.

    Args:
        model: the dense model's folder.
        folder: of the checkpoint.
        trust_remote_code: copy the modelling code of config.json's `auto_map` as well.
    """
    suffixes = COPIED_SUFFIXES | ({REMOTE_CODE_SUFFIX} if trust_remote_code else set())
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix in suffixes and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    for name in COPIED_FOLDERS:
        if (model / name).is_dir():
            # Not copytree, which gives the copy the folder's own permissions.
            (folder / name).mkdir()
            for path in sorted((model / name).iterdir()):
                if path.is_file():
                    shutil.copyfile(path, folder / name / path.name)
