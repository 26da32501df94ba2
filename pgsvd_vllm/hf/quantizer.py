"""The quantizer that makes from_pretrained and save_pretrained of transformers work on factored checkpoints.

Without `import pgsvd_vllm.hf` a factored checkpoint does not load: config.json names a weight file that does not exist,
so transformers stops instead of initializing the projections at random.
"""

import json
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import factored_linear, pivot_linear
from pgsvd_vllm.format.reader import check_factors, read_config, read_headers, weight_shape
from pgsvd_vllm.format.schema import (
    INDEX_NAME,
    LOAD_GUARD,
    QUANT_METHOD,
    WEIGHTS_STEM,
    check_pivots,
    form_shapes,
    parse_modules,
)
from pgsvd_vllm.format.writer import give_usual_permissions
from pgsvd_vllm.hf.moe_unstack import unstack_experts, without_stacking
from pgsvd_vllm.hf.transformers_compat import AUTO_QUANTIZER_MAPPING, Conv1D, mark_initialized, tied_weights
from pgsvd_vllm.hf.weight_mapping import stored_tensors, without_weight_norm


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank weight in one of the format's forms (see `format.schema`).

    Args:
        in_features: inputs.
        out_features: outputs.
        rank: of the weight.
        bias: whether there is a bias [out].
        device: of the tensors.
        dtype: of the tensors; pivots are int32.
    """

    form: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)

        for suffix, shape in form_shapes(self.form, out_features, in_features, rank).items():
            if suffix == "pivots":
                self.register_buffer(suffix, torch.empty(*shape, dtype=torch.int32, device=device))
            else:
                self.register_parameter(suffix, empty(*shape))
        self.bias = empty(out_features) if bias else None

    def extra_repr(self) -> str:
        """The sizes that print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class FactoredLinear(LowRankLinear):
    """y = U (V x) + b, the form `factors`."""

    form = "factors"
    weight_v: nn.Parameter
    weight_u: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        return factored_linear(x, self.weight_v, [self.weight_u], self.bias)


class PivotLinear(LowRankLinear):
    """y[pivots] = z and y[others] = C z with z = P x, plus b: the form `pivot` (PIFA, arXiv 2501.19090)."""

    form = "pivot"
    weight_p: nn.Parameter
    weight_c: nn.Parameter
    pivots: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        return pivot_linear(x, self.weight_p, self.weight_c, self.pivots, self.bias)


MODULES: dict[str, type[LowRankLinear]] = {cls.form: cls for cls in (FactoredLinear, PivotLinear)}


class PgsvdQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` section of config.json, which is saved unchanged.

    Raises:
        CheckpointError: the section is malformed.
    """

    def __init__(self, **section: Any) -> None:
        section["quant_method"] = QUANT_METHOD
        self.modules_table = parse_modules(section, "config.json")
        for key, value in section.items():
            setattr(self, key, value)
        self._section = section

    def to_dict(self) -> dict[str, Any]:
        """The section as it is saved."""
        return dict(self._section)


class PgsvdQuantizer(HfQuantizer):
    """Replaces the factored projections before the weights are loaded."""

    requires_calibration = True
    # Whether the model's MoE experts were unstacked.
    unstacked = False

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Set the checkpoint's index as the weight file; transformers calls this before it looks for weights."""
        config.transformers_weights = INDEX_NAME
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        """Replace the factored projections by LowRankLinear modules.

        Raises:
            CheckpointError: a tensor is missing, or the module table does not fit the model.
        """
        config: Any = self.quantization_config
        table = config.modules_table
        tensors = {}
        for file in checkpoint_files or []:
            tensors.update(read_headers(Path(file)))
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
                row.rank,
                linear.bias is not None,
                device="meta",
                dtype=linear.weight.dtype,
            )
            model.set_submodule(target, factored)
            parent: Any = model.get_submodule(target.rpartition(".")[0])
            if next(parent.buffers(recurse=False), None) is None:
                # All its parameters are loaded, and GPT-2's initialisation would access the replaced children.
                mark_initialized(parent)
        tied = tied_weights(model)
        present = set(tensors) | stored_tensors(model, list(tensors)).keys()
        for key in model.state_dict():
            if key not in present and key not in tied:
                raise CheckpointError(f"tensor {key} is missing from the checkpoint")

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' conversions without those that would match this format's tensors."""
        kept = without_weight_norm(weight_conversions)
        return without_stacking(kept) if self.unstacked else kept

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PivotLinear):
                check_pivots(module.pivots, module.out_features, f"{name}.pivots")
        setattr(model, "save_pretrained", types.MethodType(_save_pretrained, model))  # noqa: B010  (mypy)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """True: save_pretrained writes the same format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters such as LoRA can be trained on top."""
        return True


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    """save_pretrained, followed by the format's file names and its load guard in config.json."""
    type(model).save_pretrained(model, save_directory, **kwargs)
    folder = Path(save_directory)
    weight_map = {}
    for path in sorted(folder.glob("model*.safetensors")):
        target = folder / path.name.replace("model", WEIGHTS_STEM, 1)
        path.rename(target)
        give_usual_permissions(target)
        weight_map.update(dict.fromkeys(read_headers(target), target.name))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = read_config(folder)
    config["transformers_weights"] = LOAD_GUARD
    # The number of tensors may change, since transformers stores tied tensors once.
    config["quantization_config"]["tensors"] = len(weight_map)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(PgsvdQuantizationConfig)
    register_quantizer(QUANT_METHOD)(PgsvdQuantizer)
