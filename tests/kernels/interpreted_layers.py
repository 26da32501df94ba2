"""vLLM's layers with factored shards as they are on a GPU, their kernels in Triton's interpreter, against float64.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_layers.py bfloat16|float16|reload|cuts|activation|bits

Only the question whether there is a GPU is answered otherwise than the truth. vLLM's scaled GEMMs, which multiply many
tokens by weights of 8 bits, are replaced by exact ones.
"""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from vllm.config import LoRAConfig, VllmConfig
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.platforms import current_platform

from benchmarks.linear_cpu import one_rank
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.kernels.tile_heuristics import tiles_for
from pgsvd_vllm.parallel.comm_plan import Cut
from pgsvd_vllm.serving.gemm.gpu import TritonGemms
from tests.kernels.interpreter import prepare, watch
from tests.serving.layers.test_linear import HIDDEN, MIXES, WIDE, Case, check
from tests.serving.test_collectives import check_ranks


def expected_launches(gemms: Any, tokens: int) -> int:
    """Two of our kernels, or the one that permutes cuBLAS's scattered outputs."""
    tiles = tiles_for(gemms.steps, tokens)
    if tokens == 0:
        return 0
    return 2 if tokens <= 16 else (1 if tiles[0] is None else 2) if tiles else int(gemms.layer.sources is not None)


class OtherMLP(LlamaMLP):
    """Might do something else with the layer's output."""


def check_reload() -> int:
    """A refill keeps the storage of the first weights, which captured graphs read; other ranks are refused."""
    for leaf, ranks in MIXES[:5]:
        first, second = (Case(leaf, ranks, False, torch.bfloat16, prefix=name) for name in ("first", "second"))
        first.load().finish()
        for part, kinds in second.tensors.items():
            for kind, tensor in kinds.items():
                second.tensors[part][kind] = tensor if kind == "pivots" else 1.5 * tensor
        second.load().finish()
        gemms = first.layer.pgsvd_gemms
        at = [tensor.data_ptr() for tensor in gemms._tensors()]
        gemms.refill(second.layer.pgsvd_gemms)
        if at != [tensor.data_ptr() for tensor in gemms._tensors()]:
            raise SystemExit("the weights have moved")
        first.tensors = second.tensors
        for tokens in (1, 17, 300):
            check(first, torch.randn(tokens, first.columns).bfloat16())
    other = Case("gate_up_proj", (12, "p50"), False, torch.bfloat16, prefix="smaller").load().finish()
    try:
        gemms.refill(other.layer.pgsvd_gemms)
    except ValueError as error:
        if "other ranks or pivots" not in str(error):
            raise
    else:
        raise SystemExit("weights of another rank are taken")
    return 5


def check_activation() -> int:
    """MLPs of vLLM whose gate and up layer computes the activation, and MLPs that keep theirs."""
    from pgsvd_vllm.kernels.numerics import gated_difference
    from pgsvd_vllm.kernels.shard_weights import Shard
    from pgsvd_vllm.parallel.slicing import pivot_rows
    from pgsvd_vllm.serving.layers.fused_silu import fuse_silu
    from pgsvd_vllm.serving.vllm_compat.internals import encode

    torch.set_default_dtype(torch.bfloat16)
    plain, lora = VllmConfig(), VllmConfig()
    lora.lora_config = LoRAConfig(max_lora_rank=16)
    taken = 0
    mixes = [ranks for leaf, ranks in MIXES if leaf == "gate_up_proj"]
    for number, (kind, bias, ranks) in enumerate(itertools.product((LlamaMLP, Qwen2MLP), (False, True), mixes)):
        case = Case("gate_up_proj", ranks, bias, torch.bfloat16, prefix=f"mlp{number}")
        mlp = kind(HIDDEN, WIDE, "silu", prefix=f"plain{number}")
        mlp.gate_up_proj = case.layer
        torch.nn.init.normal_(mlp.down_proj.weight, std=0.1)
        mlp.down_proj.quant_method.process_weights_after_loading(mlp.down_proj)
        if fuse_silu(mlp, lora) or fuse_silu(torch.nn.ModuleList([mlp]), plain) != 1:
            raise SystemExit(f"{kind.__name__} {ranks}: taken where it must not be, or not taken")
        case.load().finish()
        shards = []
        for kinds in case.tensors.values():
            if "pivots" in kinds:
                up, places = pivot_rows(kinds["pivots"], kinds["weight_c"], [slice(0, WIDE)])
                shards.append(Shard(kinds["weight_p"], up, places))
            elif "weight" in kinds:
                shards.append(Shard(kinds["weight"]))
            else:
                shards.append(Shard(kinds["weight_v"], kinds["weight_u"]))
        added = torch.cat([kinds["bias"] for kinds in case.tensors.values()]) if bias else None
        if not case.layer.quant_method.opaque:
            raise SystemExit("the layer is not called through the op")
        for tokens in (0, 1, 17, 300):
            x = torch.randn(tokens, HIDDEN)
            earlier = watch.launches
            hidden, _ = mlp.gate_up_proj(x)
            if watch.launches - earlier != expected_launches(case.layer.pgsvd_gemms, tokens):
                raise SystemExit(f"{kind.__name__} {ranks}, {tokens} tokens: {watch.launches - earlier} launches")
            with FakeTensorMode(allow_non_fake_inputs=True):
                name = encode(case.layer.prefix)
                traced = torch.ops.pgsvd.linear(torch.empty(tokens, HIDDEN), None, hidden.shape[1], name)
            if traced.shape != hidden.shape:
                raise SystemExit(f"traced as {tuple(traced.shape)}, computed as {tuple(hidden.shape)}")
            wrong = gated_difference(x, shards, added, hidden)
            # With AMX, vLLM's own dense layer divides by the number of tokens.
            if wrong or (tokens and not torch.equal(mlp(x), mlp.down_proj(hidden)[0])):
                raise SystemExit(f"{kind.__name__} {ranks}, {tokens} tokens: {wrong or 'the MLP is another'}")
        taken += 1
    other = OtherMLP(HIDDEN, WIDE, "silu", prefix="other")
    other.gate_up_proj = Case("gate_up_proj", (33, 20), prefix="others").layer
    # What vLLM tells stored graphs apart by.
    if "fused_activations" not in plain.additional_config["pgsvd"] or lora.additional_config:
        raise SystemExit(f"additional_config: {plain.additional_config}, {lora.additional_config}")
    if fuse_silu(other, plain) or isinstance(other.act_fn, torch.nn.Identity):
        raise SystemExit("the activation of an unknown MLP is taken")
    os.environ["PGSVD_KERNELS"] = "torch"
    mlp = LlamaMLP(HIDDEN, WIDE, "silu", prefix="torch")
    mlp.gate_up_proj = other.gate_up_proj
    if fuse_silu(mlp, plain):
        raise SystemExit("the activation is fused where cuBLAS computes the layer")
    return taken


def check_cuts() -> int:
    """Layers with a tensor-parallel collective between the launches."""
    layers = 0
    rows = [mix for mix in MIXES if mix[0] == "down_proj"]
    many = [(8, True, ("qkv_proj", ("p63", 3, None))), *((8, False, mix) for mix in rows)]
    for size, rich, (leaf, ranks) in [*((2, True, mix) for mix in MIXES), *many]:
        launches = []
        for tokens in (5, 300):
            earlier = watch.launches
            cuts, _, _ = check_ranks(leaf, ranks, size, True, torch.bfloat16, rich, tokens)
            launches.append(watch.launches - earlier)
        # Both have those that compile the kernels, and for many tokens there may be one that puts outputs in order.
        # A simulated rank starts again once it has the result of a collective.
        if launches[0] - launches[1] < size:
            raise SystemExit(f"{leaf} {ranks}, {size} ranks: {launches} launches for 5 and for 300 tokens")
        layers += cuts != {Cut.REPLICATED}
    return layers


def check_mixes(dtype: torch.dtype) -> int:
    """Every mix of factored, pivot and dense shards, with and without biases, for few and many tokens."""
    layers = 0
    for bias, (leaf, ranks) in itertools.product((False, True), MIXES):
        case = Case(leaf, ranks, bias, dtype).load().finish()
        if not isinstance(case.layer.pgsvd_gemms, TritonGemms):
            raise SystemExit(f"{leaf} {ranks}: {type(case.layer.pgsvd_gemms).__name__}")
        for tokens in (0, 1, 17, 100, 300):
            earlier = watch.launches
            check(case, torch.randn(tokens, case.columns).to(dtype))
            if watch.launches - earlier != expected_launches(case.layer.pgsvd_gemms, tokens):
                raise SystemExit(f"{leaf} {ranks}, {tokens} tokens: {watch.launches - earlier} launches")
        layers += 1
    return layers


def check_bits() -> int:
    """Layers of 8-bit weights: the kernels read them for few tokens, after a reload as well."""
    from pgsvd_vllm.format.quantization import FP8, INT8
    from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix
    from pgsvd_vllm.serving.gemm import gpu
    from pgsvd_vllm.serving.gemm.cpu import FactoredGemms
    from pgsvd_vllm.serving.vllm_compat.cpu_gemm import Gemm
    from tests.serving.layers import test_quantized as quantized

    def exact(matrix: QuantizedMatrix, dtype: torch.dtype, copies: bool = False) -> Gemm:
        # What CUTLASS wants, for which vLLM copies weights or takes slower kernels otherwise.
        if len(matrix) % 16 or any(t.data_ptr() % 16 for t in (matrix.values, matrix.scale)):
            raise SystemExit(f"{tuple(matrix.shape)}: not aligned")
        own = QuantizedMatrix(matrix.values.clone() if copies else matrix.values, matrix.scale.clone(), 8)
        return Gemm(lambda x, bias: (x.double() @ own.double().T).to(dtype), [own.values, own.scale])

    def compare(one: Any) -> None:
        for tokens in (0, 1, 17, 100):
            x = torch.randn(tokens, quantized.HIDDEN).bfloat16()
            earlier = watch.launches
            y, _ = one.layer(x)
            if watch.launches - earlier != expected_launches(one.layer.pgsvd_gemms, tokens):
                raise SystemExit(f"{tokens} tokens: {watch.launches - earlier} launches")
            expected = x.double() @ torch.cat(one.weights).T
            if (y.double() - expected).norm() > 0.006 * expected.norm():
                raise SystemExit(f"{tokens} tokens: off by {(y.double() - expected).norm() / expected.norm():.4f}")

    layers = 0
    odd: tuple[quantized.Module, ...] = (("pivot", 33), ("factors", 17), ("pivot", 19))
    for scheme, forms in itertools.product((INT8, FP8), (*quantized.FORMS[:2], odd)):
        gpu.quantized_gemm = exact
        one, other = (quantized.Layer(forms, (scheme, scheme), torch.bfloat16) for _ in range(2))
        one.load().finish()
        if not isinstance(one.layer.pgsvd_gemms, TritonGemms):
            raise SystemExit(f"{scheme.name}: {type(one.layer.pgsvd_gemms).__name__}")
        compare(one)
        for kinds in other.stored.values():
            for kind in kinds:
                if kind.endswith("_scale"):
                    kinds[kind] = 2 * kinds[kind]
        one.layer.pgsvd_gemms.refill(other.load().finish().layer.pgsvd_gemms)
        # Both factors are twice as large; outputs that are pivot rows have one factor.
        one.weights = [quantized.weight_of(kinds, scheme) for kinds in other.stored.values()]
        compare(one)
        # A kernel of vLLM's with a copy of the weights would take their memory twice.
        gpu.quantized_gemm = lambda matrix, dtype: exact(matrix, dtype, copies=True)
        third = quantized.Layer(forms, (scheme, scheme), torch.bfloat16).load().finish()
        if not isinstance(third.layer.pgsvd_gemms, FactoredGemms):
            raise SystemExit(f"{scheme.name}: weights are held twice")
        # Captured graphs hold the addresses of the first GEMMs.
        gpu.quantized_gemm = exact
        again = quantized.Layer(forms, (scheme, scheme), torch.bfloat16)
        again.layer.pgsvd_gemms = third.layer.pgsvd_gemms
        try:
            again.load().finish()
        except CheckpointError as error:
            if "other ranks or pivots" not in str(error):
                raise
        else:
            raise SystemExit("GEMMs of another kind are taken at reload")
        layers += 1
    return layers


PARTS: dict[str, Callable[[], int]] = {
    "bfloat16": lambda: check_mixes(torch.bfloat16),
    "float16": lambda: check_mixes(torch.float16),
    "reload": check_reload,
    "cuts": check_cuts,
    "activation": check_activation,
    "bits": check_bits,
}


def main() -> None:
    prepare(0)
    current_platform.is_cuda_alike = lambda: True
    with one_rank():
        before = watch.launches
        layers = PARTS[sys.argv[1]]()
        print(f"{layers} layers, {watch.launches - before} launches")


if __name__ == "__main__":
    main()
