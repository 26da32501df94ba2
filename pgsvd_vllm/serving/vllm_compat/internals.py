"""vLLM's internals behind its public extension points: ops and layers by name, class swaps, loading, MoE experts."""

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available  # internal: the engine's own layers
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    split_tensor_along_last_dim,  # internal helper of RowParallelLinear.forward
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading  # internal: the loader's bookkeeping
from vllm.model_executor.models.utils import StageMissingLayer  # internal: towers whose input is switched off
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,  # internal: hoists layer names out of compiled graphs, so that layers share them
    _encode_layer_name,  # private: the only way to make such a name
    _resolve_layer_name,  # private: the only way to read it
    direct_register_custom_op,  # internal: an op of low call overhead, on the platform's dispatch key
)

import pgsvd_vllm
from pgsvd_vllm.families import ACTIVATION, GATE_UP
from pgsvd_vllm.hf.weight_mapping import without_weight_norm

LayerName = LayerNameType
# vLLM prefixes the layers of a draft model (speculative decoding); the checkpoint's module table has no prefix.
DRAFT_PREFIX = "draft_model."
# vLLM's weight loaders name the shards of a merged QKV layer by letters.
QKV_SHARDS = {"q": 0, "k": 1, "v": 2}
# vLLM's names of a MoE expert's gate, up and down projections; its parameters of gate and up begin with w13.
GATE, UP, DOWN = "w1", "w3", "w2"
_library = torch.library.Library("pgsvd", "FRAGMENT")
# Layers by prefix, for compiled code without a forward context, such as vision encoders. Engines of one process may
# have layers of the same prefix.
_living: dict[str, "weakref.WeakSet[Any]"] = {}


def register_op(name: str, function: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Make `torch.ops.pgsvd.NAME` of a function with annotated arguments and of its fake."""
    direct_register_custom_op(name, function, fake_impl=fake, target_lib=_library)


def encode(prefix: str) -> LayerNameType:
    """A layer's prefix as ops take it."""
    return _encode_layer_name(prefix)


def make_findable(layer: Any, config: VllmConfig) -> None:
    """Let compiled graphs find a layer by its `prefix`."""
    # Internal: the forward context hands these layers to ops.
    config.compilation_config.static_forward_context[layer.prefix] = layer
    _living.setdefault(layer.prefix, weakref.WeakSet()).add(layer)


def is_findable(layer: Any, config: VllmConfig) -> bool:
    """Whether a layer of this prefix is known to the engine."""
    return layer.prefix in config.compilation_config.static_forward_context


def find_layer(name: LayerNameType) -> Any:
    """The layer of a running engine's compiled graph.

    Raises:
        RuntimeError: there is no forward context, and no engine of the process, or several, have such a layer.
    """
    prefix = _resolve_layer_name(name)
    if is_forward_context_available():
        layer = get_forward_context().no_compile_layers.get(prefix)
        if layer is not None:
            return layer
    living = _living.get(prefix, weakref.WeakSet())
    if len(living) > 1:
        gc.collect()  # engines that are gone leave reference cycles behind
    if not living:
        raise RuntimeError(f"no engine in this process has a layer {prefix}: the compiled code is of another model")
    if len(living) > 1:
        raise RuntimeError(
            f"{len(living)} engines in this process have a layer {prefix}, and compiled code outside of a forward "
            "context cannot tell them apart: start one engine per process, or use enforce_eager"
        )
    return next(iter(living))


def compiles_layers_apart(config: VllmConfig) -> bool:
    """Whether factored layers have to be opaque ops while the model is traced.

    vLLM's own compilation shares graphs between layers, so ranks must not be part of a graph; on GPUs the launches
    also depend on the number of tokens. A model that is traced as one graph (CPU) calls the GEMMs directly.
    """
    mode = config.compilation_config.mode
    return mode == CompilationMode.VLLM_COMPILE or (current_platform.is_cuda_alike() and mode != CompilationMode.NONE)


def keeps_weights(config: VllmConfig) -> bool:
    """Whether graphs, captured or compiled, may hold the addresses of the first weights that are loaded."""
    return current_platform.is_cuda_alike() or config.compilation_config.mode != CompilationMode.NONE


def mark_compiled_graphs(config: VllmConfig, **switches: str | int) -> bool:
    """Tell apart the cached graphs of models whose traced code our switches change.

    Internal: `additional_config` is the only part of vLLM's compile hash that a plugin can add to.

    Returns:
        False if the configuration has no place for it; the traced code has to stay vLLM's own then.
    """
    if not isinstance(config.additional_config, dict):
        return False
    marks = config.additional_config.setdefault("pgsvd", {"version": pgsvd_vllm.__version__})
    marks.update(switches)
    return True


def model_type(config: VllmConfig) -> str:
    """The Hugging Face type of the language model; empty without a model."""
    return "" if config.model_config is None else config.model_config.hf_text_config.model_type


def checkpoint_name(prefix: str) -> str:
    """A layer's prefix without vLLM's mark of a draft model."""
    return prefix.removeprefix(DRAFT_PREFIX)


class InnerReduceRowParallelLinear(RowParallelLinear):
    """A row-parallel layer whose method returns the reduced outputs, bias included.

    A copy of vLLM's forward without its all-reduce. `reduce_results` stays true: models read it, and some clear it.
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, nn.Parameter | None]:
        """[..., in of this rank, or all] -> [..., out]."""
        x = input_
        if not self.input_is_parallel:
            x = split_tensor_along_last_dim(input_, num_partitions=self.tp_size)[self.tp_rank].contiguous()
        y = self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)
        if not self.reduce_results and self.tp_rank:
            # Cleared after the layer was made: the model sums the outputs of all ranks.
            y = torch.zeros_like(y)
        if not self.return_bias:
            return y
        return y, self.bias if self.skip_bias_add else None


def reduces_plainly(layer: nn.Module) -> bool:
    """Whether a row-parallel layer has vLLM's own forward, which `reduce_inside` can replace."""
    return type(layer) is RowParallelLinear


def reduce_inside(layer: Any) -> None:
    """Leave a row-parallel layer's all-reduce to its method, by a swap of its class: vLLM has no hook between."""
    layer.__class__ = InnerReduceRowParallelLinear


def disabled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of towers whose input is switched off: vLLM keeps their layers out of the module tree."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StageMissingLayer) and module.module is not None:
            yield from module.module.named_modules(prefix=name)


def path_prefix(layer: LinearBase, path: str) -> str:
    """The prefix of a layer that is named after its path in the model, with the mark of a draft model."""
    return f"{DRAFT_PREFIX}{path}" if layer.prefix.startswith(DRAFT_PREFIX) else path


def replace_linear_method(layer: LinearBase, method: LinearMethodBase, prefix: str) -> None:
    """Give a layer another method before its weights are loaded, as if it had been made with that one.

    Args:
        layer: without weights.
        method: the new one.
        prefix: the layer's name from now on, under which compiled graphs find it.
    """
    made: Any = layer
    made.prefix = prefix
    device = made.weight.device
    del made.weight
    made.quant_method = method
    columns = getattr(made, "input_size_per_partition", made.input_size)
    partitions = made.output_partition_sizes if isinstance(layer, ColumnParallelLinear) else [made.output_size]
    with device:
        method.create_weights(layer, columns, partitions, made.input_size, made.output_size, made.params_dtype)
        record_metadata_for_reloading(layer)


def replace_lm_head_method(head: ParallelLMHead, method: Any) -> None:
    """Give an LM head another method, before its weights are loaded."""
    made: Any = head
    device, dtype = made.weight.device, made.weight.dtype
    del made.weight
    made.quant_method = method
    rows, width = made.num_embeddings_per_partition, made.embedding_dim
    with device:
        method.create_weights(
            head, width, [rows], width, made.num_embeddings_padded, dtype, weight_loader=made.weight_loader
        )
        record_metadata_for_reloading(head)


def keep_names_of_factors(model: Any) -> None:
    """Stop vLLM's Transformers backend from renaming `weight_v`, which it takes for an old weight-norm tensor."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None and mapper.orig_to_new_renaming:
        names = without_weight_norm(mapper.orig_to_new_renaming)
        model.hf_to_vllm_mapper = dataclasses.replace(mapper, orig_to_new_renaming=names)


def silu_mlp_parts(mlp: nn.Module) -> tuple[Any, Any]:
    """An MLP's gate and up layer and its SiLU activation; None for each that it does not have."""
    activation = getattr(mlp, ACTIVATION, None)
    return getattr(mlp, GATE_UP, None), activation if type(activation) is SiluAndMul else None


def take_activation(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replace an MLP's SiluAndMul by the identity; returns vLLM's kernel, whatever `forward` is in compiled code."""
    activation = getattr(mlp, ACTIVATION)
    setattr(mlp, ACTIVATION, nn.Identity())
    return activation.forward_cuda if hasattr(activation, "op") else activation.forward_native


def expert_names(layer: RoutedExperts) -> dict[str, str | None]:
    """vLLM's names of an expert's projections -> the checkpoint's; None for a gate-less expert's up projection."""
    return {GATE: layer.ckpt_gate_proj_name, UP: layer.ckpt_up_proj_name, DOWN: layer.ckpt_down_proj_name}


def local_expert(layer: RoutedExperts, number: int) -> int:
    """The position of an expert on this rank, -1 if another rank has it; vLLM has no public name for it."""
    return layer._map_global_expert_id_to_local_expert_id(number)


def expert_parameter(shard_id: str) -> str:
    """The beginning of the names of vLLM's parameters for a projection."""
    return "w2" if shard_id == DOWN else "w13"


def register_expert_factor(layer: Any, shard_id: str, kind: str, take: Callable[..., bool]) -> None:
    """An empty parameter of the name that vLLM looks up for one kind of tensor of the experts, and its loader.

    Args:
        layer: vLLM's RoutedExperts.
        shard_id: GATE (also for UP) or DOWN.
        kind: suffix of the tensors.
        take: called with the expert's number, the projection's shard id, the kind and the tensor; says whether the
            expert belongs to this rank.
    """

    # Copied protocol: RoutedExperts.weight_loader's parameters.
    def load(
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        suffix = weight_name.rpartition(".")[2].removeprefix(f"{expert_parameter(shard_id)}_")
        return take(expert_id, shard_id, suffix, loaded_weight)

    parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.weight_loader = load
    layer.register_parameter(f"{expert_parameter(shard_id)}_{kind}", parameter)


def expert_weights(layer: Any, shard_id: str) -> nn.Parameter:
    """vLLM's dense parameter with a projection of all experts of this rank."""
    return getattr(layer, f"{expert_parameter(shard_id)}_weight")


def expert_weight_names(name: str) -> set[str]:
    """vLLM's names of the dense parameters of a MoE layer."""
    return {f"{name}.{expert_parameter(shard_id)}_weight" for shard_id in (GATE, DOWN)}
