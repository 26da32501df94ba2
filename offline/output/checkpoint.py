"""Writes the compressed checkpoint: factors, dense tensors, and the model's other files."""

from pathlib import Path

import torch

from pgsvd_vllm.format.quantization import elements_of
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.format.writer import TensorWriter
from pgsvd_vllm.hf.transformers_compat import loaded_dtype
from pgsvd_vllm.offline.model.companions import companion_data, find_companions
from pgsvd_vllm.offline.model.weights import fits
from pgsvd_vllm.offline.output.outcome import Choice, CompressResult
from pgsvd_vllm.offline.output.recipe import write_recipe
from pgsvd_vllm.offline.output.report import revision_of, write_config, write_model_card, write_report
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.records import ModuleReport
from pgsvd_vllm.offline.run_state import RunState


def write_checkpoint(plan: Plan, state: RunState, choice: Choice) -> CompressResult:
    """Write the checkpoint into the state's checkpoint folder and validate it, its tensors included.

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
    weights, head = plan.source.weights, choice.lm_head
    modules: list[ModuleReport] = []
    paths: list[str] = []
    for index, row in enumerate(plan.projections.layers):
        factors = state.load_factors(index)
        for p in row:
            if p.name not in factors.tensors:
                modules.append(ModuleReport.dense(p.name, p.out_features, p.in_features))
                continue
            for suffix, tensor in factors.tensors[p.name].items():
                writer.add(f"{p.name}.{suffix}", tensor, elements_of(suffix, tensor))
            modules.append(factors.reports[p.name])
            paths.append(p.path)
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
        writer.add(name, _stored(plan, name, weights.read(name)))
    writer.close()
    copy_companions(plan.source.folder, folder, plan.options.trust_remote_code)
    result = CompressResult(
        state.output,
        choice,
        modules,
        weights.nbytes,
        weights.numel,
        writer.numel,
        writer.count,
        plan.source.is_dual_encoder,
    )
    write_config(folder, plan, result)
    write_report(folder, plan, result)
    write_recipe(folder, plan.options, revision_of(plan.source.folder))
    write_model_card(folder, plan, result)
    check_data(open_checkpoint(folder))
    return result


def _stored(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor in the dtype to store.

    It keeps its own dtype if transformers would load it in float32, such as a router's bias, or if the model does not
    use it and its values are too large (`StoredWeights.check_values` refuses those that the model uses).
    """
    dtype = plan.settings.store_dtype
    if dtype is None or not tensor.is_floating_point() or loaded_dtype(plan.source.model, name, dtype) != dtype:
        return tensor
    return tensor.to(dtype) if fits(tensor, dtype) else tensor


def copy_companions(model: Path, folder: Path, trust_remote_code: bool) -> list[Path]:
    """Copy the files beside a model's weights: tokenizer, processor, chat templates; returns their relative paths.

    Args:
        model: the dense model's folder.
        folder: of the checkpoint.
        trust_remote_code: copy the modelling code of config.json's `auto_map` as well.

    Raises:
        InputError: as of `find_companions`.
    """
    found = find_companions(model, trust_remote_code)
    for path in found:
        # Not copytree, which gives the copy the folder's own permissions.
        (folder / path.parent).mkdir(exist_ok=True)
        (folder / path).write_bytes(companion_data(model / path, trust_remote_code))
    return found
