"""SiLU fused into factored layers: a gate and up layer computes silu(gate) * up itself, on GPUs.

Only in MLPs of vLLM whose forward is known to pass the layer's output to the activation and to nothing else, and not
with LoRA, which adds to that output.
"""

import ast
import hashlib
import inspect
import logging
import textwrap
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from pgsvd_vllm.families import SILU_MLPS
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.vllm_compat.internals import mark_compiled_graphs, silu_mlp_parts, take_activation

logger = logging.getLogger("vllm.pgsvd")


def source_hash(function: str) -> str:
    """A hash of a function's source that its layout, comments and docstring do not change.

    Args:
        function: the source of one function, indented or not.
    """
    (tree,) = ast.parse(textwrap.dedent(function)).body
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def is_known(mlp: type[nn.Module]) -> bool:
    """Whether a class is one of SILU_MLPS, with a forward whose source is known."""
    known = SILU_MLPS.get(f"{mlp.__module__}.{mlp.__qualname__}")
    try:
        return known is not None and source_hash(inspect.getsource(mlp.forward)) == known
    except (OSError, SyntaxError, TypeError):  # no source, or something else than a plain function
        return False


def fuse_silu(model: nn.Module, config: VllmConfig) -> int:
    """Let factored layers compute the activations after them; before their weights are loaded.

    The model's graph changes: `config` gets a mark that tells cached graphs apart.

    Returns:
        the number of these layers.
    """
    if not current_platform.is_cuda_alike() or config.lora_config is not None:
        return 0
    from pgsvd_vllm.serving.gemm.gpu import wants_triton

    found: list[tuple[nn.Module, PgsvdLinearMethod]] = []
    for module in model.modules() if wants_triton() else ():
        layer, activation = silu_mlp_parts(module)
        method: Any = getattr(layer, "quant_method", None)
        if activation is None or not isinstance(method, PgsvdLinearMethod) or not is_known(type(module)):
            continue
        if len(method.shards) == 2 and method.cut is Cut.REPLICATED:
            found.append((module, method))
    names = hashlib.sha256(" ".join(method.layer_name for _, method in found).encode()).hexdigest()
    if not found or not mark_compiled_graphs(config, fused_activations=len(found), fused_layers=names):
        return 0
    for module, method in found:
        method.activation = take_activation(module)
    logger.info("%d factored layers compute the activation after them", len(found))
    return len(found)
