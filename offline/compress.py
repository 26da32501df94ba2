"""The pipeline: plan, calibrate, allocate ranks, factorize, write."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from pgsvd_vllm.checkpoint import ShardWriter, open_checkpoint
from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.allocate import Allocation, at_ratio, at_tolerance, by_loss
from pgsvd_vllm.offline.baselines import at_equal_ratio
from pgsvd_vllm.offline.calibrate import LayerGrams, LayerStream
from pgsvd_vllm.offline.factor_pass import factor_layers
from pgsvd_vllm.offline.model_source import Projection
from pgsvd_vllm.offline.plan import CompressOptions, Plan, check_disk, disk_bytes, make_plan
from pgsvd_vllm.offline.refine_pass import refine_layers
from pgsvd_vllm.offline.report import ModuleReport, rank_rule, write_config, write_description
from pgsvd_vllm.offline.sensitivity import GradientPass, metric_root
from pgsvd_vllm.offline.spectrum import error_profile, gram_root, output_energy
from pgsvd_vllm.offline.workspace import LayerCalibration, LayerSensitivity, Workspace

COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}
DEFAULT_RATIO = 0.2


@dataclass(frozen=True)
class CompressResult:
    """What was written.

    Attributes:
        output: the folder.
        allocation: tolerance and ranks.
        modules: one entry a projection, factored or dense.
        parameters_before, parameters_after: of the whole model.
    """

    output: Path
    allocation: Allocation
    modules: list[ModuleReport]
    parameters_before: int
    parameters_after: int


def compress(options: CompressOptions, say: Callable[[str], None] = lambda _line: None) -> CompressResult:
    """Compress a model and write it to `options.output`.

    Args:
        options: the request.
        say: called with one line at every stage.

    Raises:
        InputError: an option, the model or the text cannot be used, or the disk is full.
        CheckpointError: a file of the model is missing or damaged.
    """
    plan = make_plan(options)
    say(describe(plan))
    workspace = Workspace(plan)
    keep = workspace.has_any_layer  # of the run that is resumed
    try:
        check_disk(plan, disk_bytes(plan) - workspace.used_bytes, workspace.folder)
        calibrate_layers(plan, workspace)
        keep = True  # another --ratio or --tolerance may do
        allocation = choose_ranks(plan, workspace)
        say(
            f"ranks by {rank_rule(plan, allocation)}: {len(allocation.ranks)} of {len(plan.flat)} projections "
            f"factored, {allocation.removed:.1%} of their parameters removed"
        )
        factor_layers(plan, workspace, allocation)
        if plan.options.refine is not None:
            refine_layers(plan, workspace, say)
        result = write_checkpoint(plan, workspace, allocation)
        workspace.publish()
        return result
    except PgsvdError as error:
        if keep:
            raise type(error)(f"{error} (calibration is kept: repeat with --resume)") from None
        workspace.discard()
        raise
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise InputError(
            f"--output-dir {options.output}: the disk is full; what is done is kept in {workspace.folder}: "
            "make room and repeat with --resume"
        ) from None
    except KeyboardInterrupt:
        if workspace.has_any_layer:
            raise KeyboardInterrupt(f"finished layers are kept in {workspace.folder}, continue with --resume") from None
        workspace.discard()
        raise


def describe(plan: Plan) -> str:
    """One paragraph: model, text, what is about to happen."""
    ids = plan.windows.ids
    wanted = plan.options.num_calibration_samples
    short = f" (the text has no more; {wanted} asked for)" if len(ids) < wanted else ""
    ignored = f", {plan.ignored_parameters / 1e6:.1f} M more ignored" if plan.ignored_parameters else ""
    return (
        f"{plan.options.model}: {plan.total_parameters / 1e6:.1f} M parameters, "
        f"{sum(p.numel for p in plan.flat) / 1e6:.1f} M in {len(plan.flat)} projections of "
        f"{len(plan.projections)} layers{ignored}\n"
        f"calibration: {len(ids)} windows{short} of {ids.shape[1]} tokens from {plan.windows.name}, "
        f"on {plan.device} in {str(plan.compute_dtype).removeprefix('torch.')}"
    )


def calibrate_layers(plan: Plan, workspace: Workspace) -> None:
    """Gram matrices and output spectra of every layer that the workspace does not have yet."""
    layers = len(plan.projections)
    done = all(workspace.has_layer(i) for i in range(layers))
    if done and (not plan.measured or all(workspace.has_sensitivity(i) for i in range(layers))):
        return
    stream = LayerStream(plan.source, plan.windows.ids, plan.device, plan.compute_dtype)
    gradients = GradientPass(stream, workspace.folder / "inputs") if plan.measured else None
    with tqdm(total=layers * stream.tokens, unit="tok", unit_scale=True, desc="calibrate") as bar:
        for index, row in enumerate(plan.projections):
            collect = bool(row) and not workspace.has_layer(index)
            bar.set_postfix_str(f"layer {index + 1}/{layers}")
            if gradients is not None:
                gradients.remember(index)
            for step in stream.advance(index, row, collect):
                if isinstance(step, LayerGrams):
                    energy = _energies(plan, row, step.grams, step.leader, {}, tokens=1)
                    workspace.save_layer(index, LayerCalibration(step.grams, step.leader, energy))
                else:
                    bar.update(step)
            if not row and not workspace.has_layer(index):
                workspace.save_layer(index, LayerCalibration({}, {}, {}))
    if gradients is not None:
        _measure_sensitivity(plan, workspace, gradients)


def _measure_sensitivity(plan: Plan, workspace: Workspace, gradients: GradientPass) -> None:
    """The backward pass: gradient moments and predicted losses of every layer."""
    gradients.start(plan.options.seed)
    layers = len(plan.projections)
    with tqdm(total=layers * gradients.tokens, unit="tok", unit_scale=True, desc="gradients") as bar:
        for index in reversed(range(layers)):
            bar.set_postfix_str(f"layer {index + 1}/{layers}")
            for step in gradients.retreat(index, plan.projections[index]):
                if isinstance(step, int):
                    bar.update(step)
                else:
                    workspace.save_sensitivity(index, _loss_spectra(plan, workspace, index, step))


def _loss_spectra(plan: Plan, workspace: Workspace, index: int, moments: dict[str, torch.Tensor]) -> LayerSensitivity:
    """Eigenvalues of L^T W C W^T L for a layer's projections: twice what cutting each one loses."""
    data = workspace.load_layer(index)
    tokens = plan.windows.ids.numel()
    energy = _energies(plan, plan.projections[index], data.grams, data.leader, moments, tokens)
    return LayerSensitivity(moments, energy)


def _energies(
    plan: Plan,
    row: list[Projection],
    grams: dict[str, torch.Tensor],
    leader: dict[str, str],
    moments: dict[str, torch.Tensor],
    tokens: int,
) -> dict[str, torch.Tensor]:
    """The output energies per token of a layer's projections, in the metric of their gradients if any.

    One projection's matrices at a time: those of a large layer do not fit beside each other.
    """
    roots: dict[str, torch.Tensor] = {}
    energy = {}
    for p in row:
        name = leader[p.name]
        gram = grams[name].to(plan.device).double() / tokens
        if p.out_features > p.in_features and name not in roots:
            roots[name] = gram_root(gram)
        target = plan.source.read(f"{p.name}.weight").to(plan.device).double()
        if p.name in moments:
            target = metric_root(moments[p.name]).T @ target
        energy[p.name] = output_energy(target, gram, roots.get(name)).cpu()
    return energy


def choose_ranks(plan: Plan, workspace: Workspace) -> Allocation:
    """The ranks that the plan's ratio or tolerance gives; reads calibration, computes next to nothing."""
    ratio = DEFAULT_RATIO if plan.options.ratio is None else plan.options.ratio
    if plan.options.baseline is not None:
        return at_equal_ratio(plan.flat, ratio, plan.form, plan.ignored_parameters)
    if plan.measured:
        losses: dict[str, torch.Tensor] = {}
        for index in range(len(plan.projections)):
            losses.update(workspace.load_sensitivity(index, with_moments=False).energy)
        return by_loss(plan.flat, losses, ratio, plan.ignored_parameters, plan.form)
    profiles: dict[str, torch.Tensor] = {}
    for index in range(len(plan.projections)):
        energy = workspace.load_layer(index, with_grams=False).energy
        profiles.update({name: error_profile(values) for name, values in energy.items()})
    if plan.options.tolerance is not None:
        allocation = at_tolerance(plan.flat, profiles, plan.options.tolerance, plan.ignored_parameters, plan.form)
        if not allocation.ranks:
            raise InputError(
                f"--tolerance {plan.options.tolerance}: no projection can be factored with so small an error; raise it"
            )
        return allocation
    return at_ratio(plan.flat, profiles, ratio, plan.ignored_parameters, plan.form)


def write_checkpoint(plan: Plan, workspace: Workspace, allocation: Allocation) -> CompressResult:
    """Write the factors and everything else, and describe the result."""
    folder = workspace.begin_checkpoint()
    writer = ShardWriter(folder)
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
    factored = {f"{name}.weight" for name in allocation.ranks}
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
    write_config(folder, plan, allocation, after, writer.count)
    write_description(folder, plan, allocation, modules, after)
    open_checkpoint(folder)
    return CompressResult(workspace.output, allocation, modules, plan.total_parameters, after)
