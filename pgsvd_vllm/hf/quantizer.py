"""The quantizer that makes from_pretrained and save_pretrained of transformers work on factored checkpoints.

Without `import pgsvd_vllm.hf` a factored checkpoint does not load: config.json names a weight file that does not exist,
so transformers stops instead of initializing the projections at random.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.lowrank import factored_linear, pivot_linear
from pgsvd_vllm.format.quantization import PACKED, SCALE, dequantize, unpack
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
    DENSE,
    DENSE_INDEX_NAME,
    FLOAT_DTYPES,
    INDEX_NAME,
    LOAD_GUARD,
    QUANT_METHOD,
    WEIGHTS_STEM,
    FactoredModule,
    check_pivots,
    parse_modules,
)
from pgsvd_vllm.format.writer import give_usual_permissions, save_config, write_index
from pgsvd_vllm.hf.moe_unstack import unstack_experts, without_stacking
from pgsvd_vllm.hf.transformers_compat import AUTO_QUANTIZER_MAPPING, Conv1D, mark_initialized, tied_weights
from pgsvd_vllm.hf.weight_mapping import stored_tensors, without_weight_norm

_DTYPES = {
    **{"I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn},
    **{"F32": torch.float32, "BF16": torch.bfloat16},
}


class LowRankLinear(nn.Module):
    """A linear layer in one of the format's forms (see `format.schema`).

    Quantized matrices stay packed and are dequantized in every forward pass.

    Args:
        in_features: inputs.
        out_features: outputs.
        module: the layer's row of the module table.
        bias: whether there is a bias [out].
        device: of the tensors.
        dtype: of the matrices that are not quantized, and of the bias.
    """

    form: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        module: FactoredModule,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, module.rank
        self.schemes = module.schemes

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(*shape, dtype=dtype, device=device))

        for suffix, shape in module.shapes(out_features, in_features).items():
            scheme = self.schemes.get(suffix)
            if suffix == "pivots":
                buffer(suffix, shape, torch.int32)
            elif scheme is None:
                self.register_parameter(suffix, empty(*shape))
            else:
                shapes = scheme.shapes(*shape)
                buffer(f"{suffix}{PACKED}", shapes[PACKED], _DTYPES[scheme.dtype])
                buffer(f"{suffix}{SCALE}", shapes[SCALE], _DTYPES[scheme.scale_dtype])
        self.bias = empty(out_features) if bias else None

    def matrix(self, suffix: str, dtype: torch.dtype) -> torch.Tensor:
        """A matrix; in `dtype` if it is quantized."""
        scheme = self.schemes.get(suffix)
        if scheme is None:
            return getattr(self, suffix)
        values = unpack(getattr(self, f"{suffix}{PACKED}"), scheme)
        return dequantize(values, getattr(self, f"{suffix}{SCALE}"), torch.float32).to(dtype)

    def extra_repr(self) -> str:
        """The sizes that print(model) shows."""
        names = sorted({scheme.name for scheme in self.schemes.values()})
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return ", ".join([sizes, *names])


class FactoredLinear(LowRankLinear):
    """y = U (V x) + b, the form `factors`."""

    form = "factors"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        v, u = (self.matrix(suffix, x.dtype) for suffix in ("weight_v", "weight_u"))
        return factored_linear(x, v, [u], self.bias)


class PivotLinear(LowRankLinear):
    """y[pivots] = z and y[others] = C z with z = P x, plus b: the form `pivot` (PIFA, arXiv 2501.19090)."""

    form = "pivot"
    pivots: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        p, c = (self.matrix(suffix, x.dtype) for suffix in ("weight_p", "weight_c"))
        return pivot_linear(x, p, c, self.pivots, self.bias)


class QuantizedLinear(LowRankLinear):
    """y = W x + b with a quantized W: the form `dense`."""

    form = DENSE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        return F.linear(x, self.matrix("weight", x.dtype), self.bias)


MODULES: dict[str, type[LowRankLinear]] = {cls.form: cls for cls in (FactoredLinear, PivotLinear, QuantizedLinear)}


class PgsvdQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` section of config.json, which is saved unchanged.

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
        setattr(model, "save_pretrained", types.MethodType(_save_pretrained, model))  # noqa: B010  (mypy)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """True: save_pretrained writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters such as LoRA can be trained on top."""
        return True


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
    """save_pretrained, followed by the format's file names and its load guard in config.json."""
    folder = Path(save_directory)
    dense_index = folder / DENSE_INDEX_NAME
    dense_index.unlink(missing_ok=True)
    type(model).save_pretrained(model, save_directory, **kwargs)
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
    config["quantization_config"]["tensors"] = len(tensors)
    save_config(folder, config)


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(PgsvdQuantizationConfig)
    register_quantizer(QUANT_METHOD)(PgsvdQuantizer)
