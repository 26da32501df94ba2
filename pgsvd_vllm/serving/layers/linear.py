"""vLLM's linear method for factored layers: parameters, loading, and one opaque op for every shape.

A merged layer (QKV, gate and up) has shards of different rank and form, some of them dense. Its
parameters have the checkpoint's names, and each holds the tensors of all shards that have one:
  weight_v, weight_p, weight    [sum of rows, in], stacked
  weight_u, weight_c, pivots    flat, one row-major matrix after the other
In place of a quantized one of these matrices M there are `M_packed`, as in the checkpoint, and `M_scale`, flat in
float32. They exist until the weights are loaded and packed for the GEMMs.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, islice
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.platforms import current_platform

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import INTERLEAVED_QKV, Split
from pgsvd_vllm.format.dtypes import check_finite
from pgsvd_vllm.format.quantization import GROUP_SIZES, PACKED, PER_INT32, SCALE, unpack
from pgsvd_vllm.format.schema import check_pivots
from pgsvd_vllm.kernels.quantized_matrix import Matrix, QuantizedMatrix
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.parallel.comm_plan import CommPlan, Cut, ParallelLayer
from pgsvd_vllm.parallel.slicing import (
    by_kind,
    copy_checked,
    input_columns,
    output_rows,
    pivot_rows,
    rank_rows,
    take_rows,
)
from pgsvd_vllm.serving.collectives import all_gather_y, check_equal_on_all_ranks
from pgsvd_vllm.serving.gemm.cpu import OTHER_SIZES, FactoredGemms
from pgsvd_vllm.serving.layers.layer_shard import BY_ROWS, DTYPES, STACKED, LayerShard, is_stacked, matrix_of, on_rank
from pgsvd_vllm.serving.vllm_compat.internals import (
    QKV_SHARDS,
    LayerName,
    compiles_layers_apart,
    encode,
    find_layer,
    keeps_weights,
    make_findable,
    mark_compiled_graphs,
    model_type,
    reduce_inside,
    reduces_plainly,
    register_op,
)


class PgsvdLinearMethod(LinearMethodBase):
    """Creates, fills and applies the factors of one vLLM linear layer.

    Args:
        shards: the checkpoint modules of the layer, in the order of its output partitions; a
            module that is fused in the checkpoint stands alone for all partitions.
        comm_plan: chooses the layer's cut under tensor parallelism; has seen the model's layers before this one.

    Attributes:
        cut: the layer's tensor-parallel cut, after `create_weights`.
        nbytes: of the weights on this rank, once they are packed.
        activation: maps the outputs of both shards to half as many, if the layer computes the activation as well.
    """

    def __init__(self, shards: list[LayerShard], comm_plan: CommPlan) -> None:
        self.shards = shards
        self.comm_plan = comm_plan
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
            InputError: tensor-parallel ranks differ in PGSVD_COLLECTIVE_BYTES.
        """
        fused = len(self.shards) == 1
        counts = [len(output_partition_sizes)] if fused else [shard.partitions for shard in self.shards]
        if sum(counts) != len(output_partition_sizes):
            raise CheckpointError(
                f"layer {layer.prefix}: {len(output_partition_sizes)} partitions, but the checkpoint has "
                f"the modules {', '.join(shard.name for shard in self.shards)}"
            )
        sizes = iter(output_partition_sizes)
        self.partitions = [list(islice(sizes, count)) for count in counts]
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
        if fused and isinstance(layer, QKVParallelLinear) and model_type(config) in INTERLEAVED_QKV:
            groups, each = layer.total_num_kv_heads, layer.total_num_heads // layer.total_num_kv_heads
            self.order = by_kind(groups, each, layer.head_size)
        self.tp_size = layer.tp_size
        # A layer that is sharded over fewer ranks than the tensor-parallel group has no collective of its own.
        if 1 < layer.tp_size == get_tensor_model_parallel_world_size():
            self.cut = self._choose_cut(layer, cut_by_rows, params_dtype, config)
        # Outputs that this rank computes.
        self.rows_here = (
            [size // self.tp_size for size in self.sizes] if self.cut is Cut.ALL_REDUCE_Z_GATHER_Y else self.sizes
        )
        self.shapes = [self._shapes(index) for index in range(len(self.shards))]

        for kind in dict.fromkeys(kind for shapes in self.shapes for kind in shapes):
            shapes = [s[kind] for s in self.shapes if kind in s]
            whole: tuple[int, ...] = (sum(math.prod(s) for s in shapes),)
            if is_stacked(kind):
                whole = (sum(s[0] for s in shapes), shapes[0][1])
            dtype = self._dtype(kind, params_dtype)
            # Dummy weights fill floats only: zeros are harmless pivots and integers.
            empty = torch.empty(whole, dtype=dtype) if dtype.is_floating_point else torch.zeros(whole, dtype=dtype)
            parameter: Any = nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = self._make_loader(layer, kind)
            if matrix_of(kind) in BY_ROWS:
                # Along this dimension Falcon's loader puts its rows in the layer's order.
                parameter.output_dim = 0
            layer.register_parameter(kind, parameter)

        self.is_dummy = config.load_config.load_format == "dummy"
        if current_platform.is_cuda_alike():
            from pgsvd_vllm.serving.gemm.gpu import wants_triton

            wants_triton()  # refuses a wrong choice before anything is loaded
        self.params_dtype = params_dtype
        self.is_quantized = any(shard.module is not None and shard.module.schemes for shard in self.shards)
        # vLLM's quantized kernels are not made to be traced apart from their layers.
        self.opaque = compiles_layers_apart(config) or self.is_quantized
        self.keeps_weights = keeps_weights(config)
        if self.opaque:
            mark_compiled_graphs(config, collective_bytes=self.comm_plan.least)
        make_findable(layer, config)

    def _dtype(self, kind: str, params_dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter."""
        if kind == "pivots":
            return torch.int32
        if kind.endswith(SCALE):
            return torch.float32
        schemes = [shard.scheme(kind) for shard in self.shards if kind in shard.kinds]
        found = {params_dtype if scheme is None else DTYPES[scheme.dtype] for scheme in schemes}
        if len(found) > 1:
            names = " and ".join(sorted(scheme.name for scheme in schemes if scheme is not None))
            raise CheckpointError(f"layer {self.layer_name}: {names} in one layer cannot be served")
        return found.pop()

    def _choose_cut(self, layer: Any, by_rows: bool, dtype: torch.dtype, config: VllmConfig) -> Cut:
        """The layer's cut; a row-parallel layer whose z is all-reduced leaves its own all-reduce out."""
        self.comm_plan.check_once(check_equal_on_all_ranks)
        split = Split.OUTPUTS if by_rows else Split.NONE if self.in_here == self.in_features else Split.INPUTS
        by_inputs = split is Split.INPUTS
        parallel = ParallelLayer(
            name=self.layer_name,
            split=split,
            modules=[shard.module for shard in self.shards if shard.module is not None and not shard.is_dense],
            in_features=self.in_features,
            out_features=self.sizes[0],
            itemsize=dtype.itemsize,
            reduces_outputs=by_inputs and layer.reduce_results,
            # The all-reduce includes an adapter's part of the outputs.
            must_reduce_outputs=by_inputs and (config.lora_config is not None or not reduces_plainly(layer)),
        )
        cut = self.comm_plan.choose(parallel, layer.tp_size)
        if by_inputs and cut is not Cut.REPLICATED:
            reduce_inside(layer)
        return cut

    def _shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a shard as this rank keeps them until they are packed.

        V, P and dense weights are cut to this rank's columns, U and dense weights to its rows, V and P to its rank
        rows if z is all-gathered. C and the pivots stay whole: only both together tell the rows of this rank.
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
        if self.cut is Cut.ALL_GATHER_Z and not shard.is_dense:
            shapes[shard.kinds[0]] = (-(-shard.module.rank // self.tp_size), self.in_here)
        for suffix, scheme in shard.module.schemes.items():
            height, width = shapes.pop(suffix)
            own = on_rank(scheme, width)
            if own.group_size is not None and own.group_size not in GROUP_SIZES:
                raise CheckpointError(
                    f"layer {self.layer_name}: {width} inputs on this tensor-parallel rank are no {scheme.name} "
                    f"({shard.name}); serve it on fewer ranks"
                )
            shapes |= {f"{suffix}{ending}": shape for ending, shape in own.shapes(height, width).items()}
        return shapes

    def _rows(self, layer: Any, index: int, rows: int) -> list[slice]:
        """This rank's rows of a shard's matrix with `rows` rows in all."""
        if self.cut is Cut.ALL_REDUCE_Z_GATHER_Y:
            return output_rows(rows, self.rows_here, layer.tp_rank, layer.tp_size, 1)
        return output_rows(rows, self.partitions[index], layer.tp_rank, layer.tp_size, self.replicas[index])

    def _make_loader(self, layer: Any, kind: str) -> Callable[..., None]:
        """The function that vLLM calls with each tensor of the checkpoint that belongs to a parameter."""

        def load(
            param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: str | int | tuple[int, ...] | None = None
        ) -> None:
            index = self._shard_index(shard_id)
            shard = self.shards[index]
            name = f"{shard.name}.{kind}"
            if kind not in shard.kinds:
                module = shard.module
                form = "dense" if module is None else f"factored with rank {module.rank}, form {module.form}"
                raise CheckpointError(f"tensor {name}: config.json says {shard.name} is {form}")
            scheme = shard.scheme(kind)
            if matrix_of(kind) in BY_ROWS:
                try:
                    cuts = self._rows(layer, index, loaded_weight.shape[0])
                except ValueError as error:
                    raise CheckpointError(f"tensor {name}: {error}") from None
                loaded_weight = take_rows(loaded_weight, cuts)
            if is_stacked(kind):
                # Slicing would hide surplus columns.
                each = PER_INT32 if scheme is not None and scheme.num_bits == 4 else 1
                if loaded_weight.shape[-1] * each != self.in_features:
                    raise CheckpointError(
                        f"tensor {name}: this layer has {self.in_features} inputs, the checkpoint has shape "
                        f"{tuple(loaded_weight.shape)}"
                    )
                loaded_weight = loaded_weight[:, self.in_columns.start // each : self.in_columns.stop // each]
                if self.cut is Cut.ALL_GATHER_Z and shard.module is not None and not shard.is_dense:
                    # Padding would hide missing rows.
                    if len(loaded_weight) != shard.module.rank:
                        raise CheckpointError(
                            f"tensor {name}: the table says rank {shard.module.rank}, the checkpoint has shape "
                            f"{tuple(loaded_weight.shape)}"
                        )
                    loaded_weight = rank_rows(loaded_weight, layer.tp_rank, layer.tp_size)
            elif scheme is not None and scheme.group_size is not None and matrix_of(kind) in STACKED:
                size = self.in_here // self.shapes[index][kind][1]  # see `on_rank`
                first, last = (edge // size for edge in (self.in_columns.start, self.in_columns.stop))
                loaded_weight = loaded_weight.repeat_interleave(scheme.group_size // size, dim=1)[:, first:last]
            if kind == "pivots":
                check_pivots(loaded_weight, self.full_sizes[index], name)
            copy_checked(self._view(layer, index, kind), loaded_weight, name)
            self.loaded.add(name)

        return load

    def _shard_index(self, shard_id: str | int | tuple[int, ...] | None) -> int:
        """The shard that vLLM's loader means: by letter, by partition, or by all partitions that it stands for."""
        if isinstance(shard_id, str):
            return QKV_SHARDS[shard_id]
        first = shard_id[0] if isinstance(shard_id, tuple) else shard_id or 0
        ends = list(accumulate(len(partition) for partition in self.partitions))
        return bisect_right(ends, first)

    def _view(self, layer: Any, index: int, kind: str) -> torch.Tensor:
        """A shard's part of a parameter, in its own shape."""
        before = [shapes[kind] for shapes in self.shapes[:index] if kind in shapes]
        shape = self.shapes[index][kind]
        data = getattr(layer, kind).data
        if is_stacked(kind):
            start = sum(s[0] for s in before)
            return data[start : start + shape[0]]
        start = sum(math.prod(s) for s in before)
        return data[start : start + math.prod(shape)].view(shape)

    def _matrix(self, layer: Any, index: int, suffix: str) -> Matrix:
        """A shard's matrix."""
        scheme = self.shards[index].scheme(suffix)
        if scheme is None:
            return self._view(layer, index, suffix)
        values, scale = (self._view(layer, index, f"{suffix}{ending}") for ending in (PACKED, SCALE))
        return QuantizedMatrix(unpack(values, scheme), scale, scheme.num_bits)

    def check_complete(self) -> None:
        """Raise CheckpointError naming the first tensor of the layer that was not loaded."""
        for shard in self.shards:
            for kind in shard.kinds:
                if f"{shard.name}.{kind}" not in self.loaded:
                    raise CheckpointError(
                        f"tensor {shard.name}.{kind} is missing from the checkpoint (needed by layer {self.layer_name})"
                    )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor was loaded and is finite, pack the weights, and release the originals."""
        if not self.is_dummy:
            self.check_complete()
            for index, shard in enumerate(self.shards):
                for kind in shard.kinds:
                    check_finite(self._view(layer, index, kind), f"{shard.name}.{kind}")
        before: Any = getattr(layer, "pgsvd_gemms", None)
        packed: Any = self._pack(layer)
        device = next(layer.parameters(recurse=False)).device
        if type(before) is type(packed):  # a reload, while graphs may hold the addresses of the first weights
            try:
                before.refill(packed)
            except ValueError as error:
                if self.keeps_weights:
                    raise CheckpointError(f"layer {self.layer_name}: {error}") from None
                layer.pgsvd_gemms = packed
        elif before is not None and self.keeps_weights:
            raise CheckpointError(f"layer {self.layer_name}: {OTHER_SIZES}")
        else:
            layer.pgsvd_gemms = packed
        if hasattr(layer, "weight"):
            # It has only the rows of the dense shards: no other code may take it for the layer's weight.
            del layer.weight
        # LoRA looks up a layer's device under the names that weights have.
        if not hasattr(layer, "weight_packed"):
            layer.weight_packed = torch.empty(0, device=device)
        # The GEMMs hold their weights: packed copies on CPU, on GPUs possibly the storage of these parameters.
        for parameter in layer.parameters(recurse=False):
            if parameter is not layer.bias:
                parameter.data = parameter.data.new_empty(0)

    def _pack(self, layer: Any) -> Callable[..., torch.Tensor]:
        """The GEMMs of the loaded layer."""
        shards: list[Shard[Matrix]] = []
        for index, shard in enumerate(self.shards):
            up: Matrix | None = None
            place = None
            if shard.module is not None and shard.module.form == "factors":
                up = self._matrix(layer, index, "weight_u")
            elif shard.module is not None and not shard.is_dense:
                pivots, c = self._view(layer, index, "pivots"), self._matrix(layer, index, "weight_c")
                if self.is_dummy:
                    pivots.copy_(torch.arange(len(pivots)))
                up, place = pivot_rows(pivots, c, self._rows(layer, index, self.full_sizes[index]), self.order)
            first = "weight" if shard.module is None else shard.module.matrices[0]
            shards.append(Shard(self._matrix(layer, index, first), up, place))
        self.nbytes = sum(shard.nbytes for shard in shards)
        has_bias, dtype = layer.bias is not None, self.params_dtype
        if current_platform.is_cuda_alike():
            # Not above: without a GPU Triton need not be installed.
            from pgsvd_vllm.serving.gemm.gpu import TritonGemms, can_take

            if can_take(shards, dtype):
                try:
                    gemms = TritonGemms(shards, has_bias, self.activation, self.cut, self.tp_size, dtype)
                except ValueError as error:
                    raise CheckpointError(f"layer {self.layer_name}: {error}") from None
                if gemms.in_place:
                    return gemms
                del gemms  # its copy of the weights, before the next one is made
        return FactoredGemms(shards, self.cut, self.tp_size, dtype, self.activation)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of this rank, or half of it after the activation."""
        out = sum(self.sizes) // (1 if self.activation is None else 2)
        return apply_linear(layer, x, bias, out, self.opaque)


def apply_linear(
    layer: Any, x: torch.Tensor, bias: torch.Tensor | None, out_features: int, opaque: bool
) -> torch.Tensor:
    """x [..., in] -> [..., out_features]: the layer itself, or while an `opaque` one is traced the op that finds it."""
    if opaque and torch.compiler.is_compiling():
        return torch.ops.pgsvd.linear(x, bias, out_features, encode(layer.prefix))
    return _outputs(layer, x, bias, out_features)


def _outputs(layer: Any, x: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    # Outside of CUDA graphs every call to torch counts.
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if layer.quant_method.cut is Cut.ALL_REDUCE_Z_GATHER_Y:
        y = all_gather_y(layer.pgsvd_gemms(rows))
        y = y if bias is None else y.add_(bias)
    else:
        y = layer.pgsvd_gemms(rows, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)


def _linear(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerName) -> torch.Tensor:
    return _outputs(find_layer(layer_name), x, bias, out_features)


def _linear_fake(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, layer_name: LayerName) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# One opaque op for every factored layer, looked up by name: ranks are not part of the traced graph,
# so layers of different rank share one compiled graph where vLLM compiles layer by layer.
register_op("linear", _linear, _linear_fake)
