"""vLLM's linear method for factored layers: parameters, loading, one opaque op for every shape.

A merged layer (QKV, gate and up) has shards of different rank, some of them dense. Parameters:
  weight_v  [sum r_i, in]     the down factors of the low-rank shards, stacked
  weight_u  [sum n_i r_i]     their up factors, each [n_i, r_i] row-major at its offset
  weight    [sum n_i, in]     the dense shards, if any; exists only until the weights are loaded
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.sharding import copy_checked, input_columns, output_rows, take_rows

SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Shard:
    """One checkpoint module inside a vLLM layer.

    Attributes:
        name: module name in the checkpoint, for messages.
        rank: its rank, or None where it is dense.
    """

    name: str
    rank: int | None


class Gemm(nn.Module):
    """x @ weight.T (+ bias), prepacked by vLLM's own dispatch on CPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cpu_linear: Callable[..., torch.Tensor] | None = None
        # The dispatch turns the `bias` of a layer into float32 where the kernel it picks wants that
        # (AMX). The bias belongs to the whole layer, not to this product: an empty one shows the dtype.
        self.bias = nn.Parameter(weight.new_empty(0), requires_grad=False)
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out]."""
        if self.cpu_linear is not None:
            return self.cpu_linear(x, self.weight, None if bias is None else bias.to(self.bias.dtype))
        return F.linear(x, self.weight, bias)


class FactoredGemms:
    """The matrix products of one loaded layer: one for all down factors, one per shard after it."""

    def __init__(self, down: Gemm, outputs: list[tuple[Gemm, slice | None]], sizes: list[int]) -> None:
        self.down = down
        self.outputs = outputs  # the slice of z that feeds the shard; None: x itself (dense shard)
        self.sizes = sizes

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, in] -> [tokens, sum of sizes]."""
        z = self.down(x)
        biases = bias.split(self.sizes) if bias is not None else [None] * len(self.sizes)
        parts = []
        for (gemm, columns), part_bias in zip(self.outputs, biases, strict=True):
            # The packed products need rows that follow each other in memory.
            source = x if columns is None else z[:, columns].contiguous()
            parts.append(gemm(source, part_bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class PgsvdLinearMethod(LinearMethodBase):
    """Creates, fills and applies the factors of one vLLM linear layer.

    Args:
        shards: the checkpoint modules of the layer, in the order of its output partitions; a
            module that is fused in the checkpoint stands alone for all partitions.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register the layer's parameters with loaders that cut each shard for this rank.

        Raises:
            CheckpointError: the layer has other partitions than the checkpoint has modules.
        """
        fused = len(self.shards) == 1
        if not fused and len(self.shards) != len(output_partition_sizes):
            raise CheckpointError(
                f"layer {layer.prefix}: {len(output_partition_sizes)} partitions, but the checkpoint has "
                f"the modules {', '.join(shard.name for shard in self.shards)}"
            )
        self.partitions = [list(output_partition_sizes)] if fused else [[n] for n in output_partition_sizes]
        self.sizes = [sum(partition) for partition in self.partitions]
        self.in_features = input_size
        self.in_columns = input_columns(input_size, input_size_per_partition, layer.tp_rank)
        self.layer_name = layer.prefix
        self.loaded: set[str] = set()

        rank = sum(shard.rank or 0 for shard in self.shards)
        flat = sum(n * (shard.rank or 0) for n, shard in zip(self.sizes, self.shards, strict=True))
        dense = sum(n for n, shard in zip(self.sizes, self.shards, strict=True) if shard.rank is None)
        shapes: dict[str, tuple[int, ...]] = {
            "weight_v": (rank, input_size_per_partition),
            "weight_u": (flat,),
        }
        if dense:
            shapes["weight"] = (dense, input_size_per_partition)
        for name, shape in shapes.items():
            parameter: Any = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = self._make_loader(layer, name)
            layer.register_parameter(name, parameter)

        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        config.compilation_config.static_forward_context[layer.prefix] = layer
        _layers_without_context[layer.prefix] = layer

    def _make_loader(self, layer: Any, kind: str) -> Callable[..., None]:
        """The function vLLM calls with each tensor of the checkpoint that belongs to a parameter."""

        def load(param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: str | int | None = None) -> None:
            index = SHARD_INDEX[shard_id] if isinstance(shard_id, str) else (shard_id or 0)
            shard, partition = self.shards[index], self.partitions[index]
            name = f"{shard.name}.{kind}"
            if (shard.rank is None) != (kind == "weight"):
                form = "dense" if shard.rank is None else f"factored with rank {shard.rank}"
                raise CheckpointError(f"tensor {name}: config.json says {shard.name} is {form}")
            if kind != "weight_v":
                replicas = getattr(layer, "num_kv_head_replicas", 1) if index else 1
                try:
                    cuts = output_rows(loaded_weight.shape[0], partition, layer.tp_rank, layer.tp_size, replicas)
                except ValueError as error:
                    raise CheckpointError(f"tensor {name}: {error}") from None
                loaded_weight = take_rows(loaded_weight, cuts)
            if kind != "weight_u":
                # Cutting would hide columns too many.
                if loaded_weight.shape[-1] != self.in_features:
                    raise CheckpointError(
                        f"tensor {name}: this layer has {self.in_features} inputs, the checkpoint has shape "
                        f"{tuple(loaded_weight.shape)}"
                    )
                loaded_weight = loaded_weight[:, self.in_columns]
            copy_checked(self._views(param, kind)[index], loaded_weight, name)
            self.loaded.add(name)

        return load

    def _views(self, parameter: torch.Tensor, kind: str) -> dict[int, torch.Tensor]:
        """Shard index -> its part of a parameter, as a matrix."""
        views, start = {}, 0
        for index, (shard, size) in enumerate(zip(self.shards, self.sizes, strict=True)):
            if (shard.rank is None) != (kind == "weight"):
                continue
            rank = shard.rank or 0
            if kind == "weight_u":
                views[index] = parameter.data[start : start + size * rank].view(size, rank)
                start += size * rank
            else:
                rows = size if kind == "weight" else rank
                views[index] = parameter.data[start : start + rows]
                start += rows
        return views

    def check_complete(self) -> None:
        """Raise CheckpointError naming the first tensor of the layer that was not loaded."""
        for shard in self.shards:
            for kind in ("weight",) if shard.rank is None else ("weight_v", "weight_u"):
                if f"{shard.name}.{kind}" not in self.loaded:
                    raise CheckpointError(
                        f"tensor {shard.name}.{kind} is missing from the checkpoint (needed by layer {self.layer_name})"
                    )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every shard arrived, then pack the products; the originals are released."""
        if not self.is_dummy:
            self.check_complete()
        ups = self._views(layer.weight_u, "weight_u")
        dense = self._views(layer.weight, "weight") if hasattr(layer, "weight") else {}
        outputs: list[tuple[Gemm, slice | None]] = []
        start = 0
        for index, shard in enumerate(self.shards):
            if shard.rank is None:
                outputs.append((Gemm(dense[index]), None))
            else:
                outputs.append((Gemm(ups[index]), slice(start, start + shard.rank)))
                start += shard.rank
        layer.pgsvd_gemms = FactoredGemms(Gemm(layer.weight_v.data), outputs, self.sizes)
        if dense:
            # Only some of the layer's rows: nothing may take it for the layer's weight.
            del layer.weight
        if current_platform.is_cpu():
            for parameter in (layer.weight_v, layer.weight_u):
                parameter.data = parameter.data.new_empty(0)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of this rank."""
        return torch.ops.pgsvd.linear(x, bias, sum(self.sizes), _encode_layer_name(layer.prefix))


# Layers by name for code that runs without vLLM's forward context, such as vision encoders.
_layers_without_context: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def _find_layer(name: str) -> Any:
    if is_forward_context_available():
        layer = get_forward_context().no_compile_layers.get(name)
        if layer is not None:
            return layer
    return _layers_without_context[name]


def _linear(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerNameType) -> torch.Tensor:
    layer = _find_layer(_resolve_layer_name(layer_name))
    y = layer.pgsvd_gemms(x.reshape(-1, x.shape[-1]), bias)
    return y.view(*x.shape[:-1], out_features)


def _linear_fake(
    x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerNameType
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# One opaque op for every factored layer, looked up by name: ranks are not part of the traced graph,
# so layers of different rank share one compiled graph.
_library = torch.library.Library("pgsvd", "FRAGMENT")
direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_library)
