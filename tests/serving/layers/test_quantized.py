"""PgsvdLinearMethod with quantized matrices inside vLLM's own layers, against float64, on one rank."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers import linear as vllm_linear

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import FP8, INT8, Scheme, int4
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.rounding.forms import round_projection
from pgsvd_vllm.serving.layers.linear import PgsvdLinearMethod
from pgsvd_vllm.serving.quant_config import PgsvdConfig
from pgsvd_vllm.serving.vllm_compat.internals import encode

pytestmark = pytest.mark.usefixtures("vllm_world")
HIDDEN, HEAD, HEADS, KV_HEADS = 128, 32, 4, 2
PARTS = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}
PREFIX = "model.layers.0.self_attn"
Module = tuple[str, int]
INT4 = int4(32)


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def weight_of(stored: dict[str, torch.Tensor], down: Scheme, up: Scheme | None = None) -> torch.Tensor:
    """The weight that the stored tensors of a projection mean, float64 [out, in]."""
    first, second = ("weight_p", "weight_c") if "pivots" in stored else ("weight_v", "weight_u")
    found = {"weight": down} if "weight_packed" in stored else {first: down, second: up or down}
    return reconstruct(dequantized(stored, found))


class Layer:
    """A QKV layer of vLLM's whose shards have forms and ranks of their own.

    Args:
        forms: of q, k and v: form and rank.
        schemes: of the down factor or dense weight, and of the up factor.
        dtype: of the activations.
    """

    def __init__(self, forms: tuple[Module, ...], schemes: tuple[Scheme, Scheme], dtype: torch.dtype) -> None:
        self.weights: list[torch.Tensor] = []
        self.stored: dict[str, dict[str, torch.Tensor]] = {}
        modules: dict[str, FactoredModule] = {}
        for seed, ((part, rows), (form, rank)) in enumerate(zip(PARTS.items(), forms, strict=True)):
            plain = FactoredModule(rank, form)
            shapes = plain.shapes(rows, HIDDEN)
            tensors = {s: random(*shapes[s], seed=10 * seed + i) for i, s in enumerate(plain.matrices)}
            if form == "pivot":
                order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
                tensors["pivots"] = order[:rank].sort().values.int()
            own = dict(zip(plain.matrices, schemes, strict=False))
            modules[f"{PREFIX}.{part}"] = FactoredModule(rank, form, schemes=own)
            self.stored[part] = round_projection(tensors, torch.eye(HIDDEN, dtype=torch.float64), own)
            self.weights.append(weight_of(self.stored[part], *schemes))
        config = PgsvdConfig(modules)
        config.packed_modules_mapping = {"qkv_proj": list(PARTS)}
        self.layer: nn.Module = vllm_linear.QKVParallelLinear(
            HIDDEN,
            HEAD,
            HEADS,
            KV_HEADS,
            bias=False,
            quant_config=config,
            prefix=f"{PREFIX}.qkv_proj",
            params_dtype=dtype,
        )

    def load(self, skip: str = "") -> "Layer":
        for letter, (part, kinds) in zip("qkv", self.stored.items(), strict=True):
            for kind, tensor in kinds.items():
                if f"{part}.{kind}" != skip:
                    parameter = getattr(self.layer, kind)
                    parameter.weight_loader(parameter, tensor, letter)
        return self

    def finish(self) -> "Layer":
        self.layer.quant_method.process_weights_after_loading(self.layer)
        return self


FORMS: list[tuple[Module, ...]] = [
    (("factors", 64), ("factors", 32), ("dense", 0)),
    (("pivot", 64), ("factors", 32), ("pivot", 32)),
    (("dense", 0), ("dense", 0), ("dense", 0)),
]


@pytest.mark.parametrize("schemes", [(INT8, INT8), (INT4, INT4), (INT4, INT8), (FP8, FP8)], ids=lambda s: s[0].key)
@pytest.mark.parametrize("forms", FORMS)
def test_output_equals_that_of_the_dequantized_weights(
    forms: tuple[Module, ...], schemes: tuple[Scheme, Scheme]
) -> None:
    one = Layer(forms, schemes, torch.bfloat16).load().finish()
    assert isinstance(one.layer.quant_method, PgsvdLinearMethod)
    for tokens in (0, 1, 40):
        x = random(tokens, HIDDEN, seed=99).bfloat16()
        y, _ = one.layer(x)
        expected = x.double() @ torch.cat(one.weights).T
        assert y.shape == expected.shape
        assert float((y.double() - expected).norm()) <= 0.02 * float(expected.norm())


def test_the_op_passes_torchs_opcheck() -> None:
    one = Layer(FORMS[0], (INT8, INT8), torch.bfloat16).load().finish()
    arguments = (random(5, HIDDEN, 1).bfloat16(), None, sum(PARTS.values()), encode(one.layer.prefix))
    results = torch.library.opcheck(torch.ops.pgsvd.linear.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("kind", ["q_proj.weight_v_scale", "k_proj.weight_u_packed", "v_proj.weight_scale"])
def test_a_missing_tensor_is_named(kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{kind} is missing"):
        Layer(FORMS[0], (INT8, INT8), torch.bfloat16).load(skip=kind).finish()


def test_kinds_that_one_layer_cannot_mix_are_refused() -> None:
    schemes = {"q_proj": INT8, "k_proj": FP8}
    config = PgsvdConfig(
        {f"{PREFIX}.{part}": FactoredModule(0, "dense", schemes={"weight": one}) for part, one in schemes.items()}
    )
    config.packed_modules_mapping = {"qkv_proj": list(PARTS)}
    common = {"bias": False, "quant_config": config, "prefix": f"{PREFIX}.qkv_proj"}
    with pytest.raises(CheckpointError, match=r"FP8 and INT8 in one layer"):
        vllm_linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
