"""PgsvdLinearMethod inside vLLM's own layers, against float64, on one rank."""

from pathlib import Path

import pytest
import torch
from torch import nn

vllm_config = pytest.importorskip("vllm.config", reason="vLLM is not installed")

from vllm.model_executor.layers import linear as vllm_linear  # noqa: E402
from vllm.model_executor.layers import utils as vllm_utils  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from pgsvd_vllm.errors import CheckpointError  # noqa: E402
from pgsvd_vllm.format.schema import FactoredModule  # noqa: E402
from pgsvd_vllm.parallel.comm_plan import CommPlan  # noqa: E402
from pgsvd_vllm.serving.gemm.cpu import gemm  # noqa: E402
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod  # noqa: E402
from pgsvd_vllm.serving.quant_config import PgsvdConfig  # noqa: E402
from pgsvd_vllm.serving.vllm_compat.cpu_gemm import Gemm, can_pack, vllm_gemm  # noqa: E402
from pgsvd_vllm.serving.vllm_compat.internals import encode  # noqa: E402

pytestmark = pytest.mark.usefixtures("vllm_world")
HIDDEN, HEAD, HEADS, KV_HEADS, WIDE = 64, 8, 8, 4, 96
LEAVES = {
    "qkv_proj": {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD},
    "gate_up_proj": {"gate_proj": WIDE, "up_proj": WIDE},
    "down_proj": {"down_proj": HIDDEN},
    "up_proj": {"up_proj": WIDE},
    "gate": {"gate": 8},
}
SHARD_IDS: dict[str, str | int] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
# A shard's rank; "p8" is rank 8 in pivot form, None is dense.
Rank = int | str | None
MIXES: list[tuple[str, tuple[Rank, ...]]] = [
    ("qkv_proj", ("p24", "p8", "p16")),
    ("qkv_proj", (None, "p8", 16)),
    ("qkv_proj", ("p63", 3, None)),
    ("gate_up_proj", ("p33", "p20")),
    ("gate_up_proj", (12, "p60")),
    ("down_proj", ("p30",)),
    ("up_proj", ("p1",)),
    ("qkv_proj", (24, 8, 16)),
    ("qkv_proj", (24, None, 16)),
    ("qkv_proj", (None, 7, None)),
    ("qkv_proj", (None, None, 1)),
    ("gate_up_proj", (33, 20)),
    ("gate_up_proj", (None, 20)),
    ("gate_up_proj", (33, None)),
    ("down_proj", (30,)),
    ("up_proj", (17,)),
    ("gate", (3,)),
]


def module_of(rank: Rank) -> FactoredModule | None:
    if rank is None:
        return None
    return FactoredModule(int(rank[1:]), "pivot") if isinstance(rank, str) else FactoredModule(rank)


class Case:
    """A layer, its tensors as a checkpoint holds them, and what it should compute."""

    def __init__(
        self,
        leaf: str,
        ranks: tuple[Rank, ...],
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        prefix: str = "model.layers.0.block",
        comm_plan: CommPlan | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.leaves, self.dtype = LEAVES[leaf], dtype
        self.columns = WIDE if leaf == "down_proj" else HIDDEN
        self.names = {part: f"{prefix}.{part}" for part in self.leaves}
        self.modules = dict(zip(self.leaves, map(module_of, ranks), strict=True))
        config = PgsvdConfig({self.names[part]: module for part, module in self.modules.items() if module})
        config.packed_modules_mapping = {name: list(parts) for name, parts in LEAVES.items() if len(parts) > 1}
        config.comm_plan = comm_plan or config.comm_plan
        common = {"bias": bias, "quant_config": config, "prefix": f"{prefix}.{leaf}", "params_dtype": dtype}
        self.layer: nn.Module
        if leaf == "qkv_proj":
            self.layer = vllm_linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
        elif leaf == "gate_up_proj":
            self.layer = vllm_linear.MergedColumnParallelLinear(HIDDEN, [WIDE, WIDE], **common)
        elif leaf == "down_proj":
            self.layer = vllm_linear.RowParallelLinear(WIDE, HIDDEN, **common)
        elif leaf == "up_proj":
            self.layer = vllm_linear.ColumnParallelLinear(HIDDEN, WIDE, **common)
        else:
            self.layer = vllm_linear.ReplicatedLinear(HIDDEN, 8, **common)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        for part, rows in self.leaves.items():
            module = self.modules[part]
            shapes = {"weight": (rows, self.columns)} if module is None else module.shapes(rows, self.columns)
            self.tensors[part] = {kind: random(*shape) for kind, shape in shapes.items()}
            if "pivots" in shapes:
                order = torch.randperm(rows, generator=generator)[: shapes["pivots"][0]]
                self.tensors[part]["pivots"] = order.sort().values.int()
            if bias:
                self.tensors[part]["bias"] = random(rows)

    def load_one(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        """Hand over one tensor as vLLM's load_weights does."""
        parameter = getattr(self.layer, kind)
        if len(self.leaves) > 1:
            parameter.weight_loader(parameter, tensor, SHARD_IDS[part])
        else:
            parameter.weight_loader(parameter, tensor)

    def load(self, skip: tuple[str, str] | None = None) -> "Case":
        for part, kinds in self.tensors.items():
            for kind, tensor in kinds.items():
                if (part, kind) != skip:
                    self.load_one(part, kind, tensor)
        return self

    def finish(self) -> "Case":
        self.layer.quant_method.process_weights_after_loading(self.layer)
        return self

    def expected(self, x: torch.Tensor, partial: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The output in float64, and a bound on the rounding error of each element.

        Every GEMM sums at most `columns` or `rank` terms in float32 and rounds once to the
        dtype; a factored shard does both twice. The bound is over the absolute values of all terms.

        Args:
            x: [..., in].
            partial: sums that are rounded on their own and then summed, one a rank of tensor parallelism.
        """
        values, bounds = [], []
        unit = torch.finfo(self.dtype).eps
        accumulate = torch.finfo(torch.float32).eps
        for part in self.leaves:
            wide = {kind: tensor.double() for kind, tensor in self.tensors[part].items()}
            bias = wide.get("bias", torch.zeros(()).double())
            if "pivots" in wide:  # U: identity rows at the pivots, C elsewhere
                p, c, pivots = wide["weight_p"], wide["weight_c"], wide["pivots"].long()
                u = torch.empty(len(p) + len(c), len(p), dtype=torch.float64)
                u[pivots] = torch.eye(len(p), dtype=torch.float64)
                u[[i for i in range(len(u)) if i not in pivots]] = c
                chain = [p, u]
            elif "weight" in wide:
                chain = [wide["weight"]]
            else:
                chain = [wide["weight_v"], wide["weight_u"]]
            value, size, terms = x.double(), x.double().abs(), 0
            for matrix in chain:
                value, size, terms = value @ matrix.T, size @ matrix.abs().T, terms + matrix.shape[1]
            values.append(value + bias)
            # The bias is added afterwards except in the last GEMM of a plain factored layer.
            roundings = len(chain) + (1 if "pivots" in wide or len(self.leaves) > 1 else 0) + partial - 1
            bounds.append((roundings * unit + terms * accumulate) * (size + bias.abs()))
        return torch.cat(values, -1), torch.cat(bounds, -1)


def check(case: Case, x: torch.Tensor) -> None:
    output = case.layer(x)
    y = output[0] if isinstance(output, tuple) else output
    expected, bound = case.expected(x)
    assert y.shape == expected.shape
    assert y.dtype == case.dtype
    excess = (y.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"error over the bound by {excess.max()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("leaf", "ranks"), MIXES)
def test_output_equals_float64(leaf: str, ranks: tuple[Rank, ...], bias: bool, dtype: torch.dtype) -> None:
    case = Case(leaf, ranks, bias, dtype).load().finish()
    assert isinstance(case.layer.quant_method, PgsvdLinearMethod)
    generator = torch.Generator().manual_seed(7)
    for rows in (0, 1, 17):
        check(case, torch.randn(rows, case.columns, generator=generator).to(dtype))


def test_leading_dimensions_are_kept() -> None:
    check(Case("qkv_proj", (24, None, 16), bias=True).load().finish(), torch.randn(2, 3, HIDDEN))


def test_dense_layer_is_vllms_own() -> None:
    case = Case("qkv_proj", (None, None, None))
    assert isinstance(case.layer.quant_method, vllm_linear.UnquantizedLinearMethod)


@pytest.mark.parametrize(
    ("leaf", "ranks", "part", "kind"),
    [
        ("qkv_proj", (24, None, 16), "q_proj", "weight_v"),
        ("qkv_proj", (24, None, 16), "k_proj", "weight"),
        ("qkv_proj", (24, None, 16), "v_proj", "weight_u"),
        ("gate_up_proj", (33, 20), "up_proj", "weight_v"),
        ("down_proj", (30,), "down_proj", "weight_u"),
        ("gate", (3,), "gate", "weight_v"),
        ("qkv_proj", (24, "p8", 16), "k_proj", "weight_p"),
        ("qkv_proj", (24, "p8", 16), "k_proj", "weight_c"),
        ("qkv_proj", (24, "p8", 16), "k_proj", "pivots"),
    ],
)
def test_missing_tensor_is_named(leaf: str, ranks: tuple[Rank, ...], part: str, kind: str) -> None:
    case = Case(leaf, ranks).load(skip=(part, kind))
    with pytest.raises(CheckpointError, match=rf"tensor model\.layers\.0\.block\.{part}\.{kind} is missing"):
        case.finish()


@pytest.mark.parametrize(
    ("part", "kind", "form"),
    [
        ("k_proj", "weight_v", "dense"),
        ("k_proj", "weight_u", "dense"),
        ("q_proj", "weight", "factored with rank 24, form factors"),
        ("q_proj", "weight_p", "factored with rank 24, form factors"),
        ("v_proj", "weight_v", "factored with rank 16, form pivot"),
    ],
)
def test_unlisted_tensor_is_named(part: str, kind: str, form: str) -> None:
    case = Case("qkv_proj", (24, None, "p16"))
    if not hasattr(case.layer, kind):
        pytest.fail(f"the layer has no {kind}")
    with pytest.raises(CheckpointError, match=rf"tensor \S+\.{part}\.{kind}: config\.json says \S+\.{part} is {form}"):
        case.load_one(part, kind, torch.zeros(HIDDEN, HIDDEN))


@pytest.mark.parametrize("leaf", ["qkv_proj", "down_proj", "up_proj", "gate"])
@pytest.mark.parametrize("change", ["rank+", "rank-", "size+", "size-"])
@pytest.mark.parametrize("kind", ["weight_v", "weight_u"])
def test_wrong_shape_is_named(leaf: str, change: str, kind: str) -> None:
    case = Case(leaf, {"qkv_proj": (24, None, 16)}.get(leaf, (6,)))
    part = next(iter(case.leaves))
    rows, columns = case.tensors[part][kind].shape
    step = 1 if change.endswith("+") else -1
    if change.startswith("rank") == (kind == "weight_v"):
        rows += step
    else:
        columns += step
    with pytest.raises(CheckpointError, match=rf"^tensor model\.layers\.0\.block\.{part}\.{kind}: "):
        case.load_one(part, kind, torch.zeros(rows, columns))


@pytest.mark.parametrize("leaf", ["qkv_proj", "down_proj"])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("weight_p", (1, 0)),
        ("weight_p", (0, -1)),
        ("weight_c", (1, 0)),
        ("weight_c", (-1, 0)),
        ("weight_c", (0, 1)),
        ("pivots", (-1,)),
    ],
)
def test_wrong_shape_of_a_pivot_form_is_named(leaf: str, kind: str, change: tuple[int, ...]) -> None:
    case = Case(leaf, {"qkv_proj": ("p24", None, 16)}.get(leaf, ("p6",)))
    part = next(iter(case.leaves))
    stored = case.tensors[part][kind]
    wrong = torch.zeros([n + d for n, d in zip(stored.shape, change, strict=True)], dtype=stored.dtype)
    if kind == "pivots":
        wrong = torch.arange(len(wrong), dtype=torch.int32)
    with pytest.raises(CheckpointError, match=rf"^tensor model\.layers\.0\.block\.{part}\.{kind}: "):
        case.load_one(part, kind, wrong)


@pytest.mark.parametrize("rows", [[0, 0], [1, 0], [-1, 3], [5, HIDDEN]])
def test_impossible_pivots_are_refused(rows: list[int]) -> None:
    case = Case("down_proj", ("p2",))
    with pytest.raises(CheckpointError, match=r"tensor \S+down_proj\.pivots: not ascending row numbers from 0 to 63"):
        case.load_one("down_proj", "pivots", torch.tensor(rows, dtype=torch.int32))


def test_pivot_rank_of_all_rows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"block\.down_proj has 64 outputs, too few for pivots of rank 64"):
        Case("down_proj", ("p64",))


def test_wrong_shape_of_a_dense_shard_is_named() -> None:
    for shape in ((KV_HEADS * HEAD, HIDDEN + 1), (KV_HEADS * HEAD + 1, HIDDEN), (KV_HEADS * HEAD, HIDDEN - 1)):
        case = Case("qkv_proj", (24, None, 16))
        with pytest.raises(CheckpointError, match=r"^tensor \S+\.k_proj\.weight: "):
            case.load_one("k_proj", "weight", torch.zeros(shape))


@pytest.mark.parametrize(
    ("said", "table", "names"),
    [
        # A model that does not say what its layers are merged of.
        ({}, ["a.gate_proj", "a.up_proj"], ["a.gate_proj", "a.up_proj"]),
        ({}, ["a.up_proj"], ["a.gate_proj", "a.up_proj"]),
        # One that says it, while the checkpoint has one matrix.
        ({"gate_up_proj": ["gate_proj", "up_proj"]}, ["a.gate_up_proj"], ["a.gate_up_proj"]),
        ({"gate_up_proj": ["w1", "w2"]}, ["a.w2"], ["a.w1", "a.w2"]),
    ],
)
def test_merged_layers_find_their_modules(said: dict[str, list[str]], table: list[str], names: list[str]) -> None:
    config = PgsvdConfig({name: FactoredModule(4) for name in table})
    config.packed_modules_mapping = said
    layer = vllm_linear.MergedColumnParallelLinear(
        HIDDEN, [WIDE, WIDE], bias=False, quant_config=config, prefix="a.gate_up_proj"
    )
    assert [shard.name for shard in layer.quant_method.shards] == names
    config.check_claimed()


def test_unclaimed_factors_are_named() -> None:
    names = ("a.up_proj", "a.0.other", "a.1.other", "a.0.more")
    config = PgsvdConfig({name: FactoredModule(4) for name in names})
    vllm_linear.ColumnParallelLinear(HIDDEN, WIDE, quant_config=config, prefix="a.up_proj")
    with pytest.raises(CheckpointError, match=r"^a\.0\.other: .*--ignore 'a\.\*\.other' 'a\.\*\.more'$"):
        config.check_claimed()


def test_mismatched_partitions_are_refused() -> None:
    config = PgsvdConfig({"a.gate_proj": FactoredModule(4)})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    with pytest.raises(CheckpointError, match=r"layer a\.gate_up_proj: 3 partitions.*a\.gate_proj, a\.up_proj"):
        vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [WIDE, WIDE, WIDE], bias=False, quant_config=config, prefix="a.gate_up_proj"
        )


def test_fused_module_covers_all_partitions() -> None:
    """Some models store gate over up as one matrix: one pair of factors for both partitions."""
    config = PgsvdConfig({"a.gate_up_proj": FactoredModule(10)})
    layer = vllm_linear.MergedColumnParallelLinear(
        HIDDEN, [WIDE, WIDE], bias=False, quant_config=config, prefix="a.gate_up_proj", params_dtype=torch.float32
    )
    u, v = torch.randn(2 * WIDE, 10), torch.randn(10, HIDDEN)
    layer.weight_v.weight_loader(layer.weight_v, v)
    layer.weight_u.weight_loader(layer.weight_u, u)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(layer(x)[0], (x.double() @ v.double().T @ u.double().T).float(), rtol=1e-5, atol=1e-4)


def test_no_partial_weight_is_left() -> None:
    """Code that takes `layer.weight` for the whole matrix must not find the dense shards alone."""
    case = Case("qkv_proj", (24, None, 16)).load().finish()
    assert not hasattr(case.layer, "weight")
    assert sum(parameter.numel() for parameter in case.layer.parameters()) == 0


@pytest.mark.parametrize("traced", [False, True], ids=["opaque", "traced"])
def test_only_vllm_compilation_sees_one_op(traced: bool) -> None:
    """Opaque, layers of different ranks are one graph; traced, the GEMMs are in it."""
    config = vllm_config.VllmConfig()
    modes = vllm_config.CompilationMode
    config.compilation_config.mode = modes.DYNAMO_TRACE_ONCE if traced else modes.VLLM_COMPILE
    with vllm_config.set_current_vllm_config(config):
        mixes: list[tuple[Rank, ...]] = [(24, None, "p16"), ("p40", None, None)]
        cases = [Case("qkv_proj", ranks, bias=True, prefix=f"layers.{i}.block") for i, ranks in enumerate(mixes)]
    x = torch.randn(5, HIDDEN)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for case in cases:
        case.load().finish()
        check(case, x)
        torch.compiler.reset()
        compiled = torch.compile(case.layer.forward, backend=keep, fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], case.layer(x)[0])
    called = [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert len(called) == 2
    assert all(("pgsvd.linear" in " ".join(names)) != traced for names in called)
    assert (called[0] == called[1]) != traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_op_passes_torchs_opcheck(dtype: torch.dtype) -> None:
    case = Case("qkv_proj", (24, None, "p16"), bias=True, dtype=dtype).load().finish()
    x = torch.randn(5, HIDDEN).to(dtype)
    encoded = encode(case.layer.prefix)
    for bias in (None, case.layer.bias.data):
        results = torch.library.opcheck(torch.ops.pgsvd.linear.default, (x, bias, sum(case.leaves.values()), encoded))
        assert set(results.values()) == {"SUCCESS"}, results


def check_gemm(run: Gemm, weight: torch.Tensor, tokens: int, gap: int) -> None:
    """x whose rows lie `gap` numbers apart, with and without a bias, against float64."""
    rows, columns = weight.shape
    x, bias = torch.randn(tokens, columns + gap).to(weight.dtype)[:, gap:], torch.randn(rows).to(weight.dtype)
    bound = torch.finfo(weight.dtype).eps + columns * torch.finfo(torch.float32).eps
    for added in (None, bias):
        wide = torch.zeros(rows).double() if added is None else bias.double()
        expected = x.double() @ weight.double().T + wide
        size = x.double().abs() @ weight.double().abs().T + wide.abs()
        y = run(x, added)
        assert (y.shape, y.dtype) == ((tokens, rows), weight.dtype)
        assert ((y.double() - expected).abs() <= bound * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (1, 32), (8, 192), (48, 64), (33, 7), (100, 96), (16, 2080)])
def test_gemm_matches_float64(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    run = gemm(weight.clone(), dtype)
    for tokens in (1, 3, 17, 300):
        for gap in (0, 64):
            check_gemm(run, weight, tokens, gap)


@pytest.mark.parametrize(("rows", "columns"), [(8, 192), (48, 64)])
def test_amx_kernel_matches_float64(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a bias in bf16, and of fewer than 16 outputs it misreads rows with gaps; here it runs on any CPU."""
    if not current_platform.is_cpu() or not hasattr(torch.ops._C, "weight_packed_linear"):
        pytest.skip("only vLLM's x86 CPU build has this kernel")
    # vLLM's own rule for small GEMMs, without its check for AMX instructions.
    monkeypatch.setattr(vllm_utils, "check_cpu_sgl_kernel", lambda n, k, dtype: n < 16 or k % 32 == n % 16 == 0)
    weight = torch.randn(rows, columns).bfloat16()
    run = vllm_gemm(weight.clone())
    for tokens in (1, 3, 17):
        for gap in (0, 64):
            check_gemm(run, weight, tokens, gap)


@pytest.mark.parametrize(
    ("leaf", "ranks"), [("qkv_proj", (24, "p8", None)), ("gate_up_proj", (33, 20)), ("down_proj", (30,))]
)
def test_bf16_factors_are_packed(leaf: str, ranks: tuple[Rank, ...]) -> None:
    """Otherwise oneDNN compiles a kernel for every shape and number of tokens: too many where ranks differ."""
    if not can_pack(torch.bfloat16):
        pytest.skip("this machine has no packed kernel for bf16")
    case = Case(leaf, ranks, dtype=torch.bfloat16).load().finish()
    x = torch.randn(100, case.columns).bfloat16()
    with torch.profiler.profile() as profile:
        for tokens in range(1, 100):
            case.layer(x[:tokens])
    called = {event.key for event in profile.key_averages() if event.key.startswith("_C::")}
    assert called == {"_C::weight_packed_linear"}


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    """`--load-format dummy` fills the parameters itself; nothing is missing then."""
    config = vllm_config.VllmConfig()
    config.load_config.load_format = "dummy"
    with vllm_config.set_current_vllm_config(config):
        case = Case("qkv_proj", (24, None, "p16"))
    for parameter in case.layer.parameters():
        if parameter.is_floating_point():  # as vLLM does
            parameter.data.fill_(0.5)
    case.finish()
    y = case.layer(torch.ones(2, HIDDEN))[0]
    torch.testing.assert_close(y[:, 0], torch.full((2,), 0.5 * 0.5 * HIDDEN * 24))
    torch.testing.assert_close(y[:, HEADS * HEAD], torch.full((2,), 0.5 * HIDDEN))
    v = (HEADS + KV_HEADS) * HEAD
    torch.testing.assert_close(y[:, v], torch.full((2,), 0.5 * HIDDEN))
    torch.testing.assert_close(y[:, v + 16], torch.full((2,), 0.5 * 0.5 * HIDDEN * 16))
