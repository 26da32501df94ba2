"""The quantizer that makes from_pretrained and save_pretrained of transformers work on factored checkpoints.

Without `import pgsvd_vllm.hf` a factored checkpoint does not load: config.json names a weight file that does not exist,
so transformers stops instead of initializing the projections at random.
"""

import types
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.reader import (
    TensorInfo,
    check_count,
    check_factors,
    index_files,
    read_config,
    read_files,
    read_index,
    read_json,
    weight_shape,
)
from pgsvd_vllm.format.schema import (
    DENSE_INDEX_NAME,
    FLOAT_DTYPES,
    FORMS,
    INDEX_NAME,
    LOAD_GUARD,
    QUANT_METHOD,
    WEIGHTS_STEM,
    check_pivots,
    parse_modules,
)
from pgsvd_vllm.format.writer import give_usual_permissions, save_config, write_index
from pgsvd_vllm.hf.low_rank_linear import MODULES, LowRankLinear, PivotLinear
from pgsvd_vllm.hf.moe_unstack import unstack_experts, without_stacking
from pgsvd_vllm.hf.transformers_compat import (
    AUTO_QUANTIZER_MAPPING,
    Conv1D,
    mark_initialized,
    saves_adapters,
    tied_weights,
)
from pgsvd_vllm.hf.weight_mapping import stored_tensors, without_weight_norm


class PgsvdQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` section of config.json.

    Raises:
        CheckpointError: the section is malformed.
    """

    # The section's keys are no attributes: a file must not choose their names.
    def __init__(self, /, **section: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.section = {**section, "quant_method": QUANT_METHOD}
        self.modules_table = parse_modules(self.section, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """The section as it is saved."""
        return dict(self.section)


class PgsvdQuantizer(HfQuantizer):
    """Replaces the factored projections before the weights are loaded."""

    requires_calibration = True
    # Whether the model's MoE experts were unstacked.
    unstacked = False

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Set the checkpoint's index as the weight file; transformers calls this before it looks for weights.

        Raises:
            CheckpointError: the index of a local folder is malformed, or names files elsewhere, or none; transformers
                would follow it.
        """
        index = Path(config.name_or_path or "") / INDEX_NAME
        if index.is_file():
            found = read_json(index)
            index_files(found, index)
            if not isinstance(found.get("metadata"), dict):
                raise CheckpointError(f"{index}: metadata is missing or no object; copy the file again")
        config.transformers_weights = INDEX_NAME
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        """Replace the factored projections by LowRankLinear modules.

        Raises:
            CheckpointError: the files are not those of the index, a tensor is missing or has another shape than the
                model's, or the module table does not fit the model.
        """
        config: Any = self.quantization_config
        table = config.modules_table
        tensors = _read_tensors([Path(file) for file in checkpoint_files or []])
        check_factors(table, tensors, "checkpoint")
        if any(module.kind == "expert" for module in table.values()):
            self.unstacked = unstack_experts(model, tensors)
        # The module table has the checkpoint's names, which may differ from the model's.
        known = stored_tensors(model, [f"{name}.weight" for name in table])
        paths = {stored.names[0]: path.removesuffix(".weight") for path, stored in known.items()}
        modules = dict(model.named_modules())
        for name, row in table.items():
            target = paths.get(f"{name}.weight", name)
            linear = modules.get(target)
            if not isinstance(linear, nn.Linear | Conv1D):
                raise CheckpointError(f"config.json: {name} is not a linear layer of {type(model).__name__}")
            out, width = linear.weight.T.shape if isinstance(linear, Conv1D) else linear.weight.shape
            rows, columns = weight_shape(name, row, tensors)
            if (rows, columns) != (out, width):
                raise CheckpointError(
                    f"{name}: the factors form a {rows} x {columns} matrix, "
                    f"{type(model).__name__} needs {out} x {width}"
                )
            factored = MODULES[row.form](
                width,
                out,
                row,
                linear.bias is not None,
                device="meta",
                dtype=linear.weight.dtype,
            )
            model.set_submodule(target, factored)
            parent: Any = model.get_submodule(target.rpartition(".")[0])
            if next(parent.buffers(recurse=False), None) is None:
                # All its parameters are loaded, and GPT-2's initialisation would access the replaced children.
                mark_initialized(parent)
        _check_shapes(model, tensors)
        check_count(config.section, tensors, INDEX_NAME)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' conversions without those that would match this format's tensors."""
        kept = without_weight_norm(weight_conversions)
        return without_stacking(kept) if self.unstacked else kept

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PivotLinear):
                check_pivots(module.pivots, module.out_features, f"{name}.pivots")
            for kind, tensor in module.named_buffers(recurse=False) if isinstance(module, LowRankLinear) else ():
                check_finite(tensor, f"{name}.{kind}")
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:  # on disk
                check_finite(parameter.detach(), name)
        if find_spec("peft") is not None:  # it must know the layers before it adapts the model
            _teach_peft()
        setattr(model, "save_pretrained", types.MethodType(_save_pretrained, model))  # noqa: B010  (mypy)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """True: save_pretrained writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters such as LoRA can be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the factors themselves: packed matrices have no gradients."""
        config: Any = self.quantization_config
        return not any(module.schemes for module in config.modules_table.values())


def _teach_peft() -> None:
    """Let PEFT adapt the layers; a warning where its version lacks what this takes."""
    try:
        import_module("pgsvd_vllm.hf.peft_compat")
    except ImportError as error:
        warnings.warn(
            f"this version of PEFT cannot adapt compressed layers ({error}); install 0.20 or 0.21", stacklevel=2
        )


def _read_tensors(files: list[Path]) -> dict[str, TensorInfo]:
    """The headers of the files that transformers loads; raises CheckpointError if they are not those of the index."""
    folders = {file.parent for file in files}
    if len(folders) != 1:
        raise CheckpointError(f"{INDEX_NAME}: its weight files are not all in one folder")
    return read_index(folders.pop(), INDEX_NAME)


def _check_shapes(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError naming a tensor that the model lacks or has in another shape or kind of dtype.

    transformers accepts any shape and dtype for quantized models.

    Args:
        model: on the meta device, with the factored projections in place.
        tensors: of the checkpoint.
    """

    def meta(name: str) -> torch.Tensor:
        return torch.empty(tensors[name].shape, device="meta")

    tied = tied_weights(model)
    known = stored_tensors(model, list(tensors))
    for name, wanted in model.state_dict().items():
        stored = known.get(name)
        if stored is None:
            if name not in tied:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint")
            continue
        try:
            shape = stored.load(name, meta, model).shape
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"tensors {', '.join(stored.names[:3])}: do not form {name} ({error})") from None
        for part in stored.names if wanted.is_floating_point() else ():
            if tensors[part].dtype not in (*FLOAT_DTYPES, "F64") and wanted.dtype != torch.float8_e4m3fn:
                needed = " or ".join(FLOAT_DTYPES)
                raise CheckpointError(
                    f"tensor {part}: dtype {tensors[part].dtype}, {type(model).__name__} needs {needed}"
                )
        if shape != wanted.shape:
            raise CheckpointError(
                f"tensor {stored.names[0]}: shape {tuple(shape)}, {type(model).__name__} needs {tuple(wanted.shape)}"
            )


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    """save_pretrained, followed by the format's file names, and its module table and load guard in config.json."""
    folder = Path(save_directory)
    dense_index = folder / DENSE_INDEX_NAME
    dense_index.unlink(missing_ok=True)
    type(model).save_pretrained(model, save_directory, **kwargs)
    if saves_adapters(model):
        return
    names = index_files(read_json(dense_index), dense_index) if dense_index.exists() else ["model.safetensors"]
    dense_index.unlink(missing_ok=True)
    paths = [folder / name.replace("model", WEIGHTS_STEM, 1) for name in names]
    for name, path in zip(names, paths, strict=True):
        (folder / name).rename(path)
        give_usual_permissions(path)
    tensors = read_files(paths)
    write_index(
        folder,
        {name: info.file.name for name, info in tensors.items()},
        sum(info.nbytes for info in tensors.values()),
    )
    # Those of an earlier save into the same folder, which vLLM would load as well.
    for path in set(folder.glob(f"{WEIGHTS_STEM}*.safetensors")) - set(paths):
        path.unlink()
    config = read_config(folder)
    config["transformers_weights"] = LOAD_GUARD
    # The number of tensors may change, since transformers stores tied tensors once.
    section = config["quantization_config"]
    section["tensors"] = len(tensors)
    _update_table(section, tensors)
    save_config(folder, config)


def _update_table(section: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Set the ranks and forms of a module table to those of the saved tensors, which a merged adapter changes.

    Args:
        section: the `quantization_config` of config.json; if any rank changes it loses what was removed, `ratio` and
            `time_removed`.
        tensors: that were saved.
    """
    for name, row in section["modules"].items():
        for form, (down, *_) in FORMS.items():
            info = tensors.get(f"{name}.{down}")
            if info is not None and info.shape[0] != row["rank"]:
                row |= {"rank": info.shape[0], "form": form}
                section.pop("ratio", None)
                section.pop("time_removed", None)


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(PgsvdQuantizationConfig)
    register_quantizer(QUANT_METHOD)(PgsvdQuantizer)
