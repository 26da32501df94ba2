"""Other weights in the storage of the first ones, which captured and compiled graphs read."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.kernels.numerics import layer_difference
from pgsvd_vllm.kernels.shard_weights import Shard
from pgsvd_vllm.serving.gemm.cpu import FactoredGemms
from pgsvd_vllm.serving.quant_config import PgsvdConfig

pytestmark = pytest.mark.usefixtures("vllm_world")
COLUMNS = 64


def shards(seed: int, dtype: torch.dtype, rank: int = 16) -> list[Shard[torch.Tensor]]:
    """Four low-rank shards, one of them a pivot form with pivots of its own, and a dense one."""
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    places = torch.cat([torch.arange(24), -1 - torch.arange(8)])[torch.randperm(32, generator=generator)]
    return [
        Shard(weight(rank, COLUMNS), weight(48, rank)),
        Shard(weight(8, COLUMNS), weight(24, 8), places),
        Shard(weight(40, COLUMNS)),
        Shard(weight(5, COLUMNS), weight(32, 5)),
        Shard(weight(32, COLUMNS), weight(100, 32)),
    ]


def addresses(gemms: FactoredGemms) -> list[int]:
    """Of all weights, and of the handles of weights that oneDNN has packed."""
    found = [gemms.firsts[0], *(up for up, _ in gemms.ups)]
    weights = [weight for one in found for weight in one.weights]
    handles = [handler.handler_tensor for one in found for handler in one.handlers]
    assert gemms.order is not None
    return [tensor.data_ptr() for tensor in (*weights, *handles, gemms.order)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_refill_keeps_the_storage(dtype: torch.dtype) -> None:
    first, second = shards(1, dtype), shards(2, dtype)
    gemms = FactoredGemms(first)
    before = addresses(gemms)
    gemms.refill(FactoredGemms(second))
    assert addresses(gemms) == before
    for tokens in (1, 17):
        x = torch.randn(tokens, COLUMNS).to(dtype)
        y = gemms(x)
        assert layer_difference(x, second, None, y) == ""
        assert layer_difference(x, first, None, y) != ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_code_sees_the_new_weights(dtype: torch.dtype) -> None:
    second = shards(2, dtype)
    gemms = FactoredGemms(shards(1, dtype))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(lambda x: gemms(x), backend=keep, fullgraph=True)
    x = torch.randn(7, COLUMNS).to(dtype)
    compiled(x)
    gemms.refill(FactoredGemms(second))
    assert layer_difference(x, second, None, compiled(x)) == ""
    assert len(graphs) == 1


def test_other_ranks_are_refused_and_change_nothing() -> None:
    first = shards(1, torch.float32)
    gemms = FactoredGemms(first)
    with pytest.raises(ValueError, match="other ranks or pivots than the old ones; restart the engine"):
        gemms.refill(FactoredGemms(shards(2, torch.float32, rank=15)))
    x = torch.randn(3, COLUMNS)
    assert layer_difference(x, first, None, gemms(x)) == ""


def test_reloaded_layers_of_four_shards_keep_their_storage() -> None:
    """More low-rank shards than the GPU kernels take: these GEMMs serve them on GPUs as well."""
    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    pgsvd = PgsvdConfig({f"a.{i}": FactoredModule(16) for i in range(4)})
    pgsvd.packed_modules_mapping = {"merged": [str(i) for i in range(4)]}
    with set_current_vllm_config(config):
        layer = MergedColumnParallelLinear(
            COLUMNS, [32] * 4, bias=False, quant_config=pgsvd, prefix="a.merged", params_dtype=torch.float32
        )

    def load(seed: int) -> list[Shard[torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for parameter, size in ((layer.weight_v, (64, COLUMNS)), (layer.weight_u, (4 * 32 * 16,))):
            parameter.data = torch.empty(size)  # as vLLM does before it loads weights again
        weights = []
        for i in range(4):
            down, up = torch.randn(16, COLUMNS, generator=generator), torch.randn(32, 16, generator=generator)
            layer.weight_v.weight_loader(layer.weight_v, down, i)
            layer.weight_u.weight_loader(layer.weight_u, up, i)
            weights.append(Shard(down, up))
        layer.quant_method.process_weights_after_loading(layer)
        return weights

    x = torch.randn(5, COLUMNS)
    assert layer_difference(x, load(1), None, layer(x)[0]) == ""
    gemms = layer.pgsvd_gemms
    assert isinstance(gemms, FactoredGemms)
    weights = [weight for one in (gemms.firsts[0], *(up for up, _ in gemms.ups)) for weight in one.weights]
    before = [weight.data_ptr() for weight in weights]
    assert layer_difference(x, load(2), None, layer(x)[0]) == ""
    assert layer.pgsvd_gemms is gemms
    assert [weight.data_ptr() for weight in weights] == before
