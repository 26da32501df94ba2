"""A checkpoint's modules grouped into vLLM's layers, against the checkpoint's own tensors."""

from pathlib import Path

from pgsvd_vllm.format.reader import Checkpoint, TensorInfo, open_checkpoint
from pgsvd_vllm.format.schema import FactoredModule, parse_modules
from pgsvd_vllm.kernels.layer_shape import ShardShape
from pgsvd_vllm.parallel.layer_grouping import LayerSizes, grouped_layers
from pgsvd_vllm.parallel.preview import preview


def checkpoint(shapes: dict[str, tuple[int, int]], modules: dict[str, FactoredModule]) -> Checkpoint:
    """A checkpoint that exists in memory alone: out and in of every weight."""
    tensors = {}
    for name, (out, columns) in shapes.items():
        stored = modules[name].shapes(out, columns) if name in modules else {"weight": (out, columns)}
        tensors |= {f"{name}.{kind}": TensorInfo(Path("file"), shape, "BF16") for kind, shape in stored.items()}
    return Checkpoint(Path(), {}, modules, tensors)


FACTORS, PIVOT = FactoredModule(16), FactoredModule(40, "pivot")
LLAMA = checkpoint(
    {
        "m.0.attn.q_proj": (128, 96),
        "m.0.attn.k_proj": (32, 96),
        "m.0.attn.v_proj": (64, 96),
        "m.0.attn.o_proj": (96, 128),
        "m.0.mlp.gate_proj": (200, 96),
        "m.0.mlp.up_proj": (200, 96),
        "m.0.mlp.down_proj": (96, 200),
        "fc1": (60, 50),
    },
    {"m.0.attn.v_proj": PIVOT, "m.0.attn.q_proj": FACTORS, "m.0.mlp.down_proj": PIVOT, "fc1": FACTORS},
)


def test_siblings_merge_in_order_with_dense_ones() -> None:
    assert list(grouped_layers(LLAMA)) == [
        LayerSizes(96, (ShardShape(128, 16), ShardShape(32), ShardShape(64, 40, 40))),
        LayerSizes(200, (ShardShape(96, 40, 40),)),
        LayerSizes(50, (ShardShape(60, 16),)),
    ]


def test_tensor_parallel_ranks_hold_their_share() -> None:
    assert list(grouped_layers(LLAMA, 2)) == [
        LayerSizes(96, (ShardShape(64, 16), ShardShape(16), ShardShape(32, 40, 20))),
        LayerSizes(100, (ShardShape(96, 40, 40),)),
        LayerSizes(50, (ShardShape(30, 16),)),
    ]


def test_projectors_are_cut_as_vllm_cuts_them() -> None:
    llava = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    names = (*llava, "visual.merger.mlp.0", "visual.merger.mlp.2", "model.connector.modality_projection.proj")
    found = checkpoint(dict.fromkeys(names, (60, 50)), dict.fromkeys(names, FACTORS))
    by_outputs, by_inputs = LayerSizes(50, (ShardShape(30, 16),)), LayerSizes(25, (ShardShape(60, 16),))
    whole = LayerSizes(50, (ShardShape(60, 16),))
    assert list(grouped_layers(found, 2)) == [by_outputs, by_inputs, by_outputs, by_inputs, whole]
    plans = list(preview(found, 2, 8 * 2**20))
    assert [plan.here == plan.whole for plan in plans] == [False, False, False, False, True]
    assert plans[-1].sent == plans[-1].dense == 0


def test_every_module_of_a_checkpoint_is_in_a_layer(tiny_compressed: Path) -> None:
    found = open_checkpoint(tiny_compressed)
    shards = [shard for layer in grouped_layers(found) for shard in layer.shards if shard.rank is not None]
    assert sorted((shard.out, shard.rank) for shard in shards) == sorted(
        (out, rank) for out, _, rank in map(found.shape, found.modules)
    )


def test_kernels_run_no_experts_and_no_lm_head() -> None:
    names = ("m.0.mlp.experts.0.gate_proj", "m.0.mlp.experts.0.up_proj", "lm_head", "fc1")
    rows = {name: {"rank": 16, "form": "factors"} for name in names}
    modules = parse_modules({"quant_method": "pgsvd", "version": 1, "head": "lm_head", "modules": rows}, "here")
    assert [module.kind for module in modules.values()] == ["expert", "expert", "lm_head", "linear"]
    found = checkpoint(dict.fromkeys(names, (60, 50)), modules)
    assert list(grouped_layers(found)) == [LayerSizes(50, (ShardShape(60, 16),))]
