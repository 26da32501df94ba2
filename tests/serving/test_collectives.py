"""Factored layers on 1, 2, 4 and 8 tensor-parallel ranks against float64, and their collectives."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.parallel.comm_plan import CommPlan, Cut, collective_bytes
from pgsvd_vllm.serving.layers import linear
from pgsvd_vllm.serving.quant_config import PgsvdConfig
from tests.serving.layers.test_linear import HIDDEN, KV_HEADS, MIXES, WIDE, Case, Rank
from tests.serving.tp_ranks import Ranks, whole

pytestmark = pytest.mark.usefixtures("vllm_world")
WORLDS = (1, 2, 4, 8)
TOKENS = 5


def spendthrift() -> CommPlan:
    """Every collective is worth it, and allowed."""
    plan = CommPlan(0)
    plan.dense = 10**9
    return plan


def thrifty() -> CommPlan:
    """No collective is worth it."""
    return CommPlan(2**60)


def check_ranks(
    leaf: str, mix: tuple[Rank, ...], size: int, bias: bool, dtype: torch.dtype, rich: bool, tokens: int = TOKENS
) -> tuple[set[Cut], int, int]:
    """Compare the layer on all ranks with float64; (cuts, elements sent a token, the same as the plan counts them)."""
    ranks = Ranks(size)
    with ranks.instead_of_vllms():
        cases = []
        for ranks.rank in range(size):
            prefix = f"rank{ranks.rank}.block"  # the opaque op finds layers by name
            case = Case(leaf, mix, bias, dtype, prefix=prefix, comm_plan=spendthrift() if rich else thrifty())
            sent, dense = case.layer.quant_method.comm_plan.sent, case.layer.quant_method.comm_plan.dense
            case.load()
            for part, kinds in case.tensors.items():
                if "bias" in kinds:
                    case.load_one(part, "bias", kinds["bias"])
            cases.append(case.finish())
        x = torch.randn(tokens, cases[0].columns, generator=torch.Generator().manual_seed(7)).to(dtype)
        own = cases[0].columns // size if leaf == "down_proj" else 0
        ys = ranks.each(lambda rank: cases[rank].layer(x[:, rank * own : (rank + 1) * own] if own else x)[0])
    if own or leaf == "gate":
        y = ys[0]
        assert all(torch.equal(y, other) for other in ys)
    else:
        replicas = [max(1, size // KV_HEADS) if part in ("k_proj", "v_proj") else 1 for part in cases[0].leaves]
        sizes = [rows // (size // copies) for rows, copies in zip(cases[0].leaves.values(), replicas, strict=True)]
        y = whole(ys, sizes, replicas)
    expected, bound = cases[0].expected(x, partial=size if own else 1)
    excess = (y.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"error over the bound by {excess.max()}"
    if rich:
        dense -= 10**9
    assert dense == (2 * HIDDEN if leaf == "down_proj" and size > 1 else 0)
    return {case.layer.quant_method.cut for case in cases}, ranks.sent // tokens, sent


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize(("leaf", "mix"), MIXES)
def test_all_ranks_together_match_float64(leaf: str, mix: tuple[Rank, ...], size: int) -> None:
    for bias in (False, True):
        cuts, sent, counted = check_ranks(leaf, mix, size, bias, torch.float32, rich=False)
        assert cuts == {Cut.ALL_REDUCE_Z if leaf == "down_proj" and size > 1 else Cut.REPLICATED}
        assert sent == counted


@pytest.mark.parametrize("size", WORLDS[1:])
@pytest.mark.parametrize(("leaf", "mix"), MIXES)
def test_all_collectives_match_float64(leaf: str, mix: tuple[Rank, ...], size: int) -> None:
    for bias, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        cuts, sent, counted = check_ranks(leaf, mix, size, bias, dtype, rich=True)
        # One rank row cannot be cut; what is not cut in vLLM's layer is not cut here.
        if leaf == "gate" or (leaf, mix) in (("up_proj", ("p1",)), ("qkv_proj", (None, None, 1))):
            assert cuts == {Cut.REPLICATED}
        else:
            assert cuts == {Cut.ALL_REDUCE_Z_GATHER_Y if leaf == "down_proj" else Cut.ALL_GATHER_Z}
        # In bf16 zeros fill z up to what the packed kernel wants.
        if dtype == torch.float32:
            assert sent == counted


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_layer_without_all_reduce_returns_its_part(form: str, size: int) -> None:
    """Shared experts: their model sums theirs and the others' outputs together."""
    ranks = Ranks(size)
    with ranks.instead_of_vllms():
        layers = []
        for ranks.rank in range(size):
            case = Case("down_proj", ("p30" if form == "pivot" else 30,))
            case.layer = row_layer(spendthrift(), FactoredModule(30, form), case.names["down_proj"], False)
            layers.append(case.load().finish().layer)
        x, own = torch.randn(TOKENS, WIDE), WIDE // size
        ys = ranks.each(lambda rank: layers[rank](x[:, rank * own : (rank + 1) * own])[0])
    assert ranks.sent == 0
    expected, bound = case.expected(x, partial=size)
    assert ((torch.stack(ys).double().sum(0) - expected).abs() <= bound).all()


def test_all_reduce_cleared_later_returns_its_part() -> None:
    """vLLM's transformers backend clears the flag of shared experts when their layers exist."""
    ranks = Ranks(2)
    with ranks.instead_of_vllms():
        layers = []
        for ranks.rank in range(2):
            case = Case("down_proj", (30,))
            layers.append(case.load().finish().layer)
            assert case.layer.quant_method.cut is Cut.ALL_REDUCE_Z
            case.layer.reduce_results = False
        x, own = torch.randn(TOKENS, WIDE), WIDE // 2
        ys = ranks.each(lambda rank: layers[rank](x[:, rank * own : (rank + 1) * own])[0])
    expected, bound = case.expected(x, partial=2)
    assert ((torch.stack(ys).double().sum(0) - expected).abs() <= bound).all()


def test_layer_over_fewer_ranks_has_no_collective() -> None:
    """Where queries are replicated for the context, a layer is cut over some of the ranks alone."""
    ranks = Ranks(2)
    with ranks.instead_of_vllms(), pytest.MonkeyPatch.context() as patch:
        assert column_layer(spendthrift()).quant_method.cut is Cut.ALL_GATHER_Z
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 4)
        assert column_layer(spendthrift()).quant_method.cut is Cut.REPLICATED


def test_replicated_inputs_are_sharded() -> None:
    ranks = Ranks(2)
    with ranks.instead_of_vllms():
        layers = []
        for ranks.rank in range(2):
            case = Case("down_proj", (30,), bias=True)
            case.layer.input_is_parallel = False
            case.load_one("down_proj", "bias", case.tensors["down_proj"]["bias"])
            layers.append(case.load().finish().layer)
        x = torch.randn(TOKENS, WIDE)
        ys = ranks.each(lambda rank: layers[rank](x)[0])
    expected, bound = case.expected(x, partial=2)
    assert all(((y.double() - expected).abs() <= bound).all() for y in ys)


def test_bias_is_returned_if_the_model_adds_it() -> None:
    ranks = Ranks(2)
    with ranks.instead_of_vllms():
        layers = []
        for ranks.rank in range(2):
            case = Case("down_proj", (30,), bias=True)
            case.layer.skip_bias_add = True
            case.load_one("down_proj", "bias", case.tensors["down_proj"]["bias"])
            layers.append(case.load().finish().layer)
        x, own = torch.randn(TOKENS, WIDE), WIDE // 2
        outputs = ranks.each(lambda rank: layers[rank](x[:, rank * own : (rank + 1) * own]))
    expected, bound = case.expected(x, partial=2)
    for y, bias in outputs:
        assert torch.equal(bias, case.tensors["down_proj"]["bias"])
        assert (((y + bias).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("size", WORLDS[1:])
@pytest.mark.parametrize("module", [FactoredModule(10), FactoredModule(20, "pivot")], ids=["factors", "pivot"])
def test_fused_matrix_is_sharded_by_rank_rows(module: FactoredModule, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    shapes = module.shapes(2 * WIDE, HIDDEN)
    tensors = {kind: torch.randn(*shape, generator=generator) for kind, shape in shapes.items()}
    pivots = torch.randperm(2 * WIDE, generator=generator)[:20].sort().values
    if "pivots" in tensors:
        tensors["pivots"] = pivots.int()
    config = PgsvdConfig({"a.gate_up_proj": module})
    ranks = Ranks(size)
    with ranks.instead_of_vllms():
        layers = []
        for ranks.rank in range(size):
            config.comm_plan = spendthrift()
            layer = vllm_linear.MergedColumnParallelLinear(
                *(HIDDEN, [WIDE, WIDE], False),
                quant_config=config,
                prefix="a.gate_up_proj",
                params_dtype=torch.float32,
            )
            for kind, tensor in tensors.items():
                parameter = getattr(layer, kind)
                parameter.weight_loader(parameter, tensor)
            layer.quant_method.process_weights_after_loading(layer)
            assert layer.quant_method.cut is Cut.ALL_GATHER_Z
            layers.append(layer)
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        ys = ranks.each(lambda rank: layers[rank](x)[0])
    down, up = (tensors[kind].double() for kind in module.suffixes[:2])
    z = x.double() @ down.T
    expected = z @ up.T
    if "pivots" in tensors:
        others = [i for i in range(2 * WIDE) if i not in pivots]
        expected = torch.empty(TOKENS, 2 * WIDE, dtype=torch.float64)
        expected[:, pivots], expected[:, others] = z, z @ up.T
    y = whole(ys, [WIDE // size] * 2, [1, 1])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def row_layer(
    plan: CommPlan, module: FactoredModule | None = None, name: str = "a.down_proj", sums: bool = True
) -> nn.Module:
    config = PgsvdConfig({name: module or FactoredModule(30)})
    config.comm_plan = plan
    return vllm_linear.RowParallelLinear(
        *(WIDE, HIDDEN, False), quant_config=config, prefix=name, params_dtype=torch.float32, reduce_results=sums
    )


def column_layer(plan: CommPlan, name: str = "a.up_proj") -> nn.Module:
    config = PgsvdConfig({name: FactoredModule(30)})
    config.comm_plan = plan
    return vllm_linear.ColumnParallelLinear(HIDDEN, WIDE, False, quant_config=config, prefix=name)


def test_lora_and_subclasses_keep_vllms_all_reduce() -> None:
    """LoRA and classes derived from vLLM's add to the outputs before the all-reduce."""

    class Other(vllm_linear.RowParallelLinear):
        pass

    with Ranks(2).instead_of_vllms():
        plan = spendthrift()
        assert row_layer(plan).quant_method.cut is Cut.ALL_REDUCE_Z_GATHER_Y
        config = VllmConfig()
        config.lora_config = LoRAConfig(max_lora_rank=16)
        with set_current_vllm_config(config):
            layer = row_layer(plan)
        assert layer.quant_method.cut is Cut.REPLICATED
        assert type(layer) is vllm_linear.RowParallelLinear
        pgsvd = PgsvdConfig({"a": FactoredModule(30)})
        assert Other(WIDE, HIDDEN, False, quant_config=pgsvd, prefix="a").quant_method.cut is Cut.REPLICATED


def test_shared_experts_have_no_collective() -> None:
    """vLLM may run them on a stream of their own, where their collective would meet the experts'."""
    with Ranks(2).instead_of_vllms():
        assert column_layer(spendthrift()).quant_method.cut is Cut.ALL_GATHER_Z
        assert column_layer(spendthrift(), "mlp.shared_experts.up_proj").quant_method.cut is Cut.REPLICATED
        assert column_layer(spendthrift(), "mlp.shared_expert.up_proj").quant_method.cut is Cut.REPLICATED
        assert row_layer(spendthrift(), name="mlp.shared_expert.down_proj").quant_method.cut is Cut.REPLICATED


def test_wrong_rank_rows_are_named() -> None:
    with Ranks(2).instead_of_vllms():
        layer = column_layer(spendthrift())
    # 15 are as many as this rank keeps of 30.
    for rows in (15, 29, 31):
        with pytest.raises(CheckpointError, match=rf"tensor a\.up_proj\.weight_v: .*rank 30.*\({rows}, 64\)"):
            layer.weight_v.weight_loader(layer.weight_v, torch.zeros(rows, HIDDEN))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("tp_size", WORLDS[1:])
def test_traffic_never_exceeds_dense(share: float, tp_size: int) -> None:
    """Llama-2-7B's sizes, plain factors; and it keeps about its share on a rank."""
    hidden, wide = 4096, 11008
    square, oblong = int((1 - share) * hidden / 2), int((1 - share) * hidden * wide / (hidden + wide))
    plan = CommPlan(0)
    kept = total = 0

    def keep(cut: Cut, out: int, columns: int, rank: int, by_outputs: bool) -> None:
        nonlocal kept, total
        total += rank * (out + columns)
        v, u = rank * columns / tp_size, rank * out / tp_size
        if by_outputs and cut is Cut.REPLICATED:
            v *= tp_size
        if not by_outputs and cut is not Cut.ALL_REDUCE_Z_GATHER_Y:
            u *= tp_size
        kept += v + u

    for _ in range(32):
        for ranks, out in (([square] * 3, hidden), ([oblong] * 2, wide)):
            cut = plan.by_outputs(ranks, hidden, tp_size, 2)
            for rank in ranks:
                keep(cut, out, hidden, rank, by_outputs=True)
            assert plan.sent <= plan.dense
            columns = hidden if out == hidden else wide
            keep(plan.by_inputs(ranks[0], hidden, hidden, tp_size, 2), hidden, columns, ranks[0], by_outputs=False)
            assert plan.sent <= plan.dense
    assert plan.dense == 32 * 4 * hidden
    if tp_size == 2 and share >= 0.4:
        assert kept <= 0.55 * total


@pytest.mark.parametrize("wrong", ["", "-1", "8MB", "1.5"])
def test_malformed_threshold_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSVD_COLLECTIVE_BYTES", wrong)
    with pytest.raises(InputError, match="PGSVD_COLLECTIVE_BYTES"):
        collective_bytes()


def test_a_collective_must_save_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSVD_COLLECTIVE_BYTES", "1000")
    plan = CommPlan(collective_bytes())
    plan.dense = 10**6
    assert plan.by_outputs([20], 49, 2, 2) is Cut.REPLICATED
    assert plan.by_outputs([20], 50, 2, 2) is Cut.ALL_GATHER_Z
