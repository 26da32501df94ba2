"""vLLM's linear method for factored layers: parameters, loading, and one opaque op for every shape.

A merged layer (QKV, gate and up) has shards of different rank and form, some of them dense. Its
parameters bear the checkpoint's names, each holding the tensors of all shards that have one:
  weight_v, weight_p, weight    [sum of rows, in], stacked
  weight_u, weight_c, pivots    flat, one row-major matrix after the other
They exist until the weights are loaded; then the products are packed from them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import INTERLEAVED_QKV, may_run_on_side_stream
from pgsvd_vllm.format.schema import FactoredModule, check_pivots
from pgsvd_vllm.parallel.comm_plan import CommPlan, Cut
from pgsvd_vllm.parallel.slicing import (
    by_kind,
    copy_checked,
    input_columns,
    output_rows,
    pivot_rows,
    rank_rows,
    take_rows,
)
from pgsvd_vllm.serving.collectives import joined
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms
from pgsvd_vllm.serving.vllm_compat import InnerReduceRowParallelLinear, _model_type, find_layer, make_findable

SHARD_INDEX = {"q": 0, "k": 1, "v": 2}
# The kinds of tensors that have the layer's inputs as columns.
STACKED = ("weight_v", "weight_p", "weight")


@dataclass(frozen=True)
class LayerShard:
    """One checkpoint module inside a vLLM layer.

    Attributes:
        name: module name in the checkpoint, for messages.
        module: its rank and form, or None where it is dense.
    """

    name: str
    module: FactoredModule | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return ("weight",) if self.module is None else self.module.suffixes


class PgsvdLinearMethod(LinearMethodBase):
    """Creates, fills and applies the factors of one vLLM linear layer.

    Args:
        shards: the checkpoint modules of the layer, in the order of its output partitions; a
            module that is fused in the checkpoint stands alone for all partitions.
        traffic: of the model's layers before this one, under tensor parallelism.

    Attributes:
        cut: what ranks of tensor parallelism exchange inside the layer, once it has weights.
        nbytes: of the weights on this rank, once they are packed.
        activation: what turns the outputs of both shards into half as many, where the layer computes that
            as well.
    """

    def __init__(self, shards: list[LayerShard], traffic: CommPlan) -> None:
        self.shards = shards
        self.traffic = traffic
        self.cut = Cut.REPLICATED
        self.nbytes = 0
        self.activation: Callable[[torch.Tensor], torch.Tensor] | None = None

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
        # Column-parallel layers hold a share of each shard's rows.
        cut_by_rows = sum(output_partition_sizes) < output_size
        self.replicas = [getattr(layer, "num_kv_head_replicas", 1) if i else 1 for i in range(len(self.shards))]
        self.full_sizes = [
            size * (layer.tp_size // replicas if cut_by_rows else 1)
            for size, replicas in zip(self.sizes, self.replicas, strict=True)
        ]
        self.in_here = input_size_per_partition
        config = get_current_vllm_config()
        self.order = None
        if fused and isinstance(layer, QKVParallelLinear) and _model_type(config) in INTERLEAVED_QKV:
            groups, each = layer.total_num_kv_heads, layer.total_num_heads // layer.total_num_kv_heads
            self.order = by_kind(groups, each, layer.head_size)
        self.workers = layer.tp_size
        # Not where a layer is cut over other ranks than those that would exchange something.
        if 1 < layer.tp_size == get_tensor_model_parallel_world_size():
            self.cut = self._choose_cut(layer, cut_by_rows, params_dtype, config.lora_config is not None)
        # Outputs that this rank computes.
        self.rows_here = (
            [size // self.workers for size in self.sizes] if self.cut is Cut.ALL_REDUCE_Z_GATHER_Y else self.sizes
        )
        self.shapes = [self._shapes(index) for index in range(len(self.shards))]

        for kind in dict.fromkeys(kind for shapes in self.shapes for kind in shapes):
            shapes = [s[kind] for s in self.shapes if kind in s]
            whole: tuple[int, ...] = (sum(math.prod(s) for s in shapes),)
            if kind in STACKED:
                whole = (sum(s[0] for s in shapes), input_size_per_partition)
            dtype = torch.int32 if kind == "pivots" else params_dtype
            # Dummy weights fill floats only: zeros are harmless pivots.
            empty = torch.zeros(whole, dtype=dtype) if kind == "pivots" else torch.empty(whole, dtype=dtype)
            parameter: Any = nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = self._make_loader(layer, kind)
            if kind == "weight_u":
                # Along this dimension Falcon's loader puts its rows in the layer's order.
                parameter.output_dim = 0
            layer.register_parameter(kind, parameter)

        self.is_dummy = config.load_config.load_format == "dummy"
        # vLLM's own compilation shares graphs between layers: there ranks must not be part of them, and what GPUs
        # launch depends on the number of tokens. Where the model is traced as one graph (CPU) or not at all, the
        # products are called directly, which costs less.
        mode = config.compilation_config.mode
        on_gpu = current_platform.is_cuda_alike()
        if on_gpu:
            from pgsvd_vllm.serving.gemm.gpu import wants_triton

            wants_triton()  # a wrong choice is told before anything is loaded
        self.opaque = mode == CompilationMode.VLLM_COMPILE or (on_gpu and mode != CompilationMode.NONE)
        make_findable(layer, config)

    def _choose_cut(self, layer: Any, by_rows: bool, dtype: torch.dtype, has_lora: bool) -> Cut:
        """What the ranks exchange; makes the layer's class that of one that sums inside where it does."""
        modules = [shard.module for shard in self.shards if shard.module is not None]
        if may_run_on_side_stream(self.layer_name):
            return Cut.REPLICATED
        if by_rows:
            ranks = [module.rank for module in modules]
            return self.traffic.by_outputs(ranks, self.in_features, layer.tp_size, dtype.itemsize)
        if self.in_here == self.in_features or not layer.reduce_results:
            return Cut.REPLICATED
        out = self.sizes[0]
        # An adapter's part of the outputs is to be summed as well.
        if has_lora or type(layer) is not RowParallelLinear:
            self.traffic.summed(out)
            return Cut.REPLICATED
        rows = modules[0].shapes(out, self.in_here)[modules[0].suffixes[1]][0]
        cut = self.traffic.by_inputs(modules[0].rank, rows, out, layer.tp_size, dtype.itemsize)
        if cut is not Cut.REPLICATED:
            layer.__class__ = InnerReduceRowParallelLinear
        return cut

    def _shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a shard as this rank keeps them until they are packed.

        V, P and dense weights come cut to this rank's columns, U and dense weights to its rows, V and P
        to its rank rows where z is gathered; C and the pivots come whole, since only both together tell
        which rows are this rank's.
        """
        shard, rows = self.shards[index], self.rows_here[index]
        if shard.module is None:
            return {"weight": (rows, self.in_here)}
        if shard.module.form == "pivot":
            rows = self.full_sizes[index]
            if rows <= shard.module.rank:
                raise CheckpointError(
                    f"layer {self.layer_name}: {shard.name} has {rows} outputs, too few for pivots of rank "
                    f"{shard.module.rank}"
                )
        shapes = shard.module.shapes(rows, self.in_here)
        if self.cut is Cut.ALL_GATHER_Z:
            shapes[shard.kinds[0]] = (-(-shard.module.rank // self.workers), self.in_here)
        return shapes

    def _rows(self, layer: Any, index: int, rows: int) -> list[slice]:
        """This rank's rows of a shard's matrix with `rows` rows in all."""
        if self.cut is Cut.ALL_REDUCE_Z_GATHER_Y:
            return output_rows(rows, self.rows_here, layer.tp_rank, layer.tp_size, 1)
        return output_rows(rows, self.partitions[index], layer.tp_rank, layer.tp_size, self.replicas[index])

    def _make_loader(self, layer: Any, kind: str) -> Callable[..., None]:
        """The function vLLM calls with each tensor of the checkpoint that belongs to a parameter."""

        def load(param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: str | int | None = None) -> None:
            index = SHARD_INDEX[shard_id] if isinstance(shard_id, str) else (shard_id or 0)
            shard = self.shards[index]
            name = f"{shard.name}.{kind}"
            if kind not in shard.kinds:
                module = shard.module
                form = "dense" if module is None else f"factored with rank {module.rank}, form {module.form}"
                raise CheckpointError(f"tensor {name}: config.json says {shard.name} is {form}")
            if kind in ("weight", "weight_u"):
                try:
                    cuts = self._rows(layer, index, loaded_weight.shape[0])
                except ValueError as error:
                    raise CheckpointError(f"tensor {name}: {error}") from None
                loaded_weight = take_rows(loaded_weight, cuts)
            if kind in STACKED:
                # Cutting would hide columns too many.
                if loaded_weight.shape[-1] != self.in_features:
                    raise CheckpointError(
                        f"tensor {name}: this layer has {self.in_features} inputs, the checkpoint has shape "
                        f"{tuple(loaded_weight.shape)}"
                    )
                loaded_weight = loaded_weight[:, self.in_columns]
                if self.cut is Cut.ALL_GATHER_Z and shard.module is not None:
                    # The same of rows too few.
                    if len(loaded_weight) != shard.module.rank:
                        raise CheckpointError(
                            f"tensor {name}: the table says rank {shard.module.rank}, the checkpoint has shape "
                            f"{tuple(loaded_weight.shape)}"
                        )
                    loaded_weight = rank_rows(loaded_weight, layer.tp_rank, layer.tp_size)
            if kind == "pivots":
                check_pivots(loaded_weight, self.full_sizes[index], name)
            copy_checked(self._view(layer, index, kind), loaded_weight, name)
            self.loaded.add(name)

        return load

    def _view(self, layer: Any, index: int, kind: str) -> torch.Tensor:
        """A shard's part of a parameter, in its own shape."""
        before = [shapes[kind] for shapes in self.shapes[:index] if kind in shapes]
        shape = self.shapes[index][kind]
        data = getattr(layer, kind).data
        if kind in STACKED:
            start = sum(s[0] for s in before)
            return data[start : start + shape[0]]
        start = sum(math.prod(s) for s in before)
        return data[start : start + math.prod(shape)].view(shape)

    def check_complete(self) -> None:
        """Raise CheckpointError naming the first tensor of the layer that was not loaded."""
        for shard in self.shards:
            for kind in shard.kinds:
                if f"{shard.name}.{kind}" not in self.loaded:
                    raise CheckpointError(
                        f"tensor {shard.name}.{kind} is missing from the checkpoint (needed by layer {self.layer_name})"
                    )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every shard arrived, then pack the products; the originals are released."""
        if not self.is_dummy:
            self.check_complete()
        before: Any = getattr(layer, "pgsvd_gemms", None)
        packed = self._pack(layer)
        device = next(layer.parameters(recurse=False)).device
        if hasattr(before, "refill"):  # loaded again, while captured graphs hold the first weights
            try:
                before.refill(packed)
            except ValueError as error:
                raise CheckpointError(f"layer {self.layer_name}: {error}") from None
        else:
            layer.pgsvd_gemms = packed
        if hasattr(layer, "weight"):
            # Only some of the layer's rows: nothing may take it for the layer's weight.
            del layer.weight
        # LoRA asks for a layer's device by the names that weights have.
        layer.weight_packed = torch.empty(0, device=device)
        # The products hold what they need; on CPU that is packed, elsewhere it may be these tensors themselves.
        for parameter in layer.parameters(recurse=False):
            if parameter is not layer.bias:
                parameter.data = parameter.data.new_empty(0)

    def _pack(self, layer: Any) -> Callable[..., torch.Tensor]:
        """The products of the loaded layer."""
        readers = [self._view(layer, i, shard.kinds[0]) for i, shard in enumerate(self.shards)]
        ups: list[torch.Tensor | None] = []
        places: list[torch.Tensor | None] = []
        for index, shard in enumerate(self.shards):
            up = place = None
            if shard.module is not None and shard.module.form == "factors":
                up = self._view(layer, index, "weight_u")
            elif shard.module is not None:
                pivots, c = self._view(layer, index, "pivots"), self._view(layer, index, "weight_c")
                if self.is_dummy:
                    pivots.copy_(torch.arange(len(pivots)))
                up, place = pivot_rows(pivots, c, self._rows(layer, index, self.full_sizes[index]), self.order)
            ups.append(up)
            places.append(place)
        self.nbytes = sum(part.nbytes for part in (*readers, *ups) if part is not None)
        if current_platform.is_cuda_alike():
            # Not above: without a GPU Triton need not be installed.
            from pgsvd_vllm.kernels.packed_weights import MOST_SHARDS
            from pgsvd_vllm.serving.gemm.gpu import TritonGemms

            if sum(up is not None for up in ups) <= MOST_SHARDS:
                try:
                    return TritonGemms(
                        readers, ups, places, layer.bias is not None, self.activation, self.cut, self.workers
                    )
                except ValueError as error:
                    raise CheckpointError(f"layer {self.layer_name}: {error}") from None
        return FactoredGemms(readers, ups, places, self.cut, self.workers)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of this rank, or half of it after the activation."""
        out = sum(self.sizes) // (1 if self.activation is None else 2)
        if not self.opaque:
            return _outputs(layer, x, bias, out)
        return torch.ops.pgsvd.linear(x, bias, out, _encode_layer_name(layer.prefix))


def _outputs(layer: Any, x: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if layer.quant_method.cut is Cut.ALL_REDUCE_Z_GATHER_Y:
        y = joined(layer.pgsvd_gemms(rows))
        y = y if bias is None else y.add_(bias)
    else:
        y = layer.pgsvd_gemms(rows, bias)
    return y.view(*x.shape[:-1], out_features)


def _linear(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerNameType) -> torch.Tensor:
    return _outputs(find_layer(_resolve_layer_name(layer_name)), x, bias, out_features)


def _linear_fake(
    x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerNameType
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# One opaque op for every factored layer, looked up by name: ranks are not part of the traced graph,
# so layers of different rank share one compiled graph where vLLM compiles layer by layer.
_library = torch.library.Library("pgsvd", "FRAGMENT")


direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_library)
