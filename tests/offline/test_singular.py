"""Weights and inputs that are zero, of low rank, or of extreme magnitude, with every method.

Each case ends in a checkpoint that `verify` accepts or in one error that names a projection or the reason; where an
answer is exact it is compared in float64.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import ChoiceError, InputError
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.conftest import save_tokenizer
from tests.offline.calibration.test_gram import reference_inputs

Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors], None]
SUFFIXES = ("weight_u", "weight_v", "weight_p", "weight_c", "pivots")
FIRST = "model.layers.0."
SILENT = "their outputs are 0 on the calibration data"
NO_LOSS = "the loss does not depend on them on the calibration data"

DISTILLED = "measured, distilled"
METHODS: dict[str, dict[str, Any]] = {
    "measured": {},
    "measured, factors": {"form": "factors"},
    "forward": {"sensitivity": "forward", "sequential": False},
    "uniform": {"sensitivity": "uniform"},
    "uniform, pivot, sequential": {"sensitivity": "uniform", "form": "pivot", "sequential": True},
    "svd": {"baseline": "svd"},
    "asvd": {"baseline": "asvd", "form": "pivot"},
    "svd-llm": {"baseline": "svd-llm"},
    "pifa": {"baseline": "pifa"},
    "LM head": {"include": ("lm_head",), "head_tolerance": 0.5},
    DISTILLED: {"refine": None},
}


def times(name: str, factor: float) -> Fault:
    """Multiply the tensors whose names contain `name`."""

    def change(tensors: Tensors) -> None:
        for key in tensors:
            if name in key:
                tensors[key] = (tensors[key].double() * factor).to(tensors[key].dtype)

    return change


def each_projection(make: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """Replace every projection."""

    def change(tensors: Tensors) -> None:
        for key in tensors:
            if key.endswith("_proj.weight"):
                tensors[key] = make(tensors[key]).to(tensors[key].dtype)

    return change


def merged(w: torch.Tensor) -> torch.Tensor:
    """Rank 2, as of merged adapters."""
    generator = torch.Generator().manual_seed(w.numel())
    return torch.randn(len(w), 2, generator=generator) @ torch.randn(2, w.shape[1], generator=generator) / 8


def one_element(w: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(w)
    found[3, 5] = 0.7
    return found


def loud_channel(tensors: Tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e4


FAULTS: dict[str, Fault] = {
    "zero up": times(FIRST + "mlp.up", 0),
    "zero down": times(FIRST + "mlp.down", 0),
    "zero q": times(FIRST + "self_attn.q", 0),
    "zero v": times(FIRST + "self_attn.v", 0),
    "zero o": times(FIRST + "self_attn.o", 0),
    "zero projections": times("_proj", 0),
    "zero norm": times("layers.1.input_layernorm", 0),
    "zero final norm": times("model.norm", 0),
    "zero embeddings": times("embed_tokens", 0),
    "tiny up": times(FIRST + "mlp.up", 1e-30),
    "tiny o": times(FIRST + "self_attn.o", 1e-30),
    "tiny projections": times("_proj", 1e-20),
    "tiny norm": times("layers.1.input_layernorm", 1e-30),
    "tiny LM head": times("lm_head", 1e-30),
    "denormal v": times(FIRST + "self_attn.v", 1e-40),
    "denormal projections": times("_proj", 1e-40),
    "huge up": times(FIRST + "mlp.up", 1e30),
    "huge q": times(FIRST + "self_attn.q", 1e30),
    "huge LM head": times("lm_head", 1e30),
    "huge embeddings": times("embed_tokens", 1e30),
    "one loud channel": loud_channel,
    "rank 2": each_projection(merged),
    "one element": each_projection(one_element),
    "equal rows": each_projection(lambda w: w[:2].repeat(len(w) // 2, 1)),
    "equal columns": each_projection(lambda w: w[:, :2].repeat(1, w.shape[1] // 2)),
    "all ones": each_projection(torch.ones_like),
}
# Methods whose factors approximate other matrices than the weights.
ERROR_AWARE = ("measured", "measured, factors", "uniform, pivot, sequential", "pifa", "LM head", DISTILLED)
# Fault and method without an answer -> the error.
ALL_DENSE = "`dataset`: all projections would stay dense, since "
TOO_MUCH = "`ratio` 0.3: more than this model can give"
SILENT_HEAD = "`include` lm_head: lm_head gives 0 on the calibration data"
ERRORS = {
    "(zero|huge) embeddings, LM head": SILENT_HEAD,
    "(zero|huge) embeddings, .*": ALL_DENSE + SILENT,
    "(zero final norm|huge up), LM head": SILENT_HEAD,
    "(zero final norm|huge up|huge LM head), (measured.*|LM head)": ALL_DENSE + NO_LOSS,
    "(tiny|denormal) projections, forward": ALL_DENSE + NO_LOSS,
    "(denormal projections|one element), (measured.*|LM head)": TOO_MUCH,
    "one element, forward": TOO_MUCH,
}
# Faults that run with every method in the quick tier; the others run with the default one.
EVERY_METHOD = ("zero up", "tiny o", "rank 2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with hidden size 32, and a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("singular") / "base"
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 9))) for _ in range(300)]
    folder.with_name("text.txt").write_text(" ".join(draw.choice(words) for _ in range(1000)), encoding="utf-8")
    return folder


def changed(base: Path, folder: Path, fault: Fault, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of the model with a fault."""
    model = folder / "model"
    shutil.copytree(base, model)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    fault(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    return model


def options_for(base: Path, model: Path, **options: Any) -> CompressOptions:
    """The options of a run that writes `out` beside the model."""
    text = str(base.with_name("text.txt"))
    given = {"ratio": 0.3, "dataset": (text,), "num_calibration_samples": 6, "max_seq_length": 64, "refine": 0}
    return CompressOptions(str(model), model.with_name("out"), **(given | options))


def factored(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Factored module -> suffix -> tensor."""
    written = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    modules = json.loads((output / "config.json").read_text())["quantization_config"]["modules"]
    return {name: {s: written[f"{name}.{s}"] for s in SUFFIXES if f"{name}.{s}" in written} for name in modules}


def cases() -> Iterator[Any]:
    for fault in FAULTS:
        for method in METHODS:
            quick = fault in EVERY_METHOD or method == "measured"
            yield pytest.param(fault, method, id=f"{fault}, {method}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("fault", "method"), cases())
def test_every_fault_gives_a_checkpoint_or_one_error(base: Path, tmp_path: Path, fault: str, method: str) -> None:
    model = changed(base, tmp_path, FAULTS[fault])
    options = options_for(base, model, **METHODS[method])
    error = next((text for case, text in ERRORS.items() if re.fullmatch(case, f"{fault}, {method}")), None)
    if error is not None:
        with pytest.raises(InputError, match=re.escape(error)):
            compress(options)
        return
    compress(options)
    check_data(open_checkpoint(options.output))
    dense = load_file(model / "model.safetensors")
    found = factored(options.output)
    assert found
    for name, tensors in found.items():
        weight, matrix = dense[f"{name}.weight"].double(), reconstruct(tensors)
        assert torch.isfinite(matrix).all()
        if not weight.any() and method != DISTILLED:
            assert not matrix.any(), f"{name} was zero"
        elif fault in ("rank 2", "one element", "all ones") and method not in ERROR_AWARE:
            assert (matrix - weight).norm() <= 1e-5 * weight.norm(), f"{name} has rank 1 or 2"


def test_uncovered_projections_stay_dense_with_a_reason(base: Path, tmp_path: Path) -> None:
    model = changed(base, tmp_path, FAULTS["zero up"])
    said: list[str] = []
    options = options_for(base, model)
    compress(options, say=said.append)
    names = {NO_LOSS: f"{FIRST}mlp.gate_proj", SILENT: f"{FIRST}mlp.down_proj"}
    dense, written = load_file(model / "model.safetensors"), load_file(next(options.output.glob("*.safetensors")))
    for reason, name in names.items():
        assert f"WARNING: 1 projections stay dense, since {reason}: {name}" in said
        assert torch.equal(written[f"{name}.weight"], dense[f"{name}.weight"])
    # The zero projection needs no data.
    up = factored(options.output)[f"{FIRST}mlp.up_proj"]
    assert up["weight_p"].shape[0] == 1
    assert not up["weight_p"].any()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("method", [method for method in METHODS if method != DISTILLED])
def test_powers_of_two_change_the_exponents_alone(base: Path, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """v and up times 2^k, o and down times 2^-k: the same model, the same ranks, and the same factors times 2^k.

    Distillation moves all parameters at the same rate, whatever their scale.
    """

    def power(name: str, k: int) -> int:
        return k if "v_proj" in name or "up_proj" in name else -k if "o_proj" in name or "down_proj" in name else 0

    def run(k: int) -> dict[str, dict[str, torch.Tensor]]:
        def change(tensors: Tensors) -> None:
            for name in tensors:
                tensors[name] = tensors[name] * 2.0 ** power(name, k)

        (tmp_path / str(k)).mkdir()
        options = options_for(base, changed(base, tmp_path / str(k), change, dtype), **METHODS[method])
        compress(options)
        return factored(options.output)

    plain = run(0)
    assert len(plain) > 5
    for k in (60, -60):
        found = run(k)
        assert found.keys() == plain.keys()
        for name, tensors in plain.items():
            for suffix, tensor in tensors.items():
                factor = 2.0 ** power(name, k) if suffix in ("weight_v", "weight_p") else 1
                assert torch.equal(found[name][suffix].double(), tensor.double() * factor), f"{name}.{suffix}"


@pytest.mark.parametrize("method", ["forward", "uniform", "svd-llm"])
def test_factors_are_exact_on_inputs_of_low_rank(base: Path, tmp_path: Path, method: str) -> None:
    """Four letters: the first layer's inputs have rank 4."""
    text, draw = tmp_path / "acgt.txt", random.Random(0)
    text.write_text("".join(draw.choice("ACGT") for _ in range(2000)), encoding="utf-8")
    options = options_for(base, changed(base, tmp_path, lambda _tensors: None), dataset=(str(text),), **METHODS[method])
    inputs = reference_inputs(base, make_plan(options).data.windows.ids)
    compress(options)
    dense, exact = load_file(base / "model.safetensors"), 0
    for name, tensors in factored(options.output).items():
        x = inputs[name].reshape(-1, inputs[name].shape[-1]).T
        singular = np.linalg.svd(x, compute_uv=False)
        rank = int((singular > 1e-6 * singular[0]).sum())
        weight = dense[f"{name}.weight"].double().numpy()
        difference = (reconstruct(tensors).numpy() - weight) @ x
        if len(tensors.get("weight_v", tensors.get("weight_p", torch.empty(0)))) >= rank:
            exact += 1
            # Gram matrices know energies to float32 rounding, 2^-24, and so amplitudes to 2^-12.
            assert np.linalg.norm(difference) <= 2.0**-12 * np.linalg.norm(weight @ x), name
    assert exact >= 3


@pytest.mark.parametrize("method", ["measured", "forward", "svd"])
def test_overflow_names_the_layer_and_projection(base: Path, tmp_path: Path, method: str) -> None:
    def change(tensors: Tensors) -> None:
        times(f"{FIRST}mlp", 1e25)(tensors)

    options = options_for(base, changed(base, tmp_path, change), **METHODS[method])
    with pytest.raises(InputError, match=r"model\.layers\.0.*overflows in torch\.float32; check the weights") as caught:
        compress(options)
    assert method == "forward" or "mlp.down_proj" in str(caught.value)


def test_a_ratio_that_factors_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    options = options_for(base, changed(base, tmp_path, lambda _tensors: None), ratio=0.001, sensitivity="uniform")
    with pytest.raises(ChoiceError, match=r"`ratio` 0\.001: too small for this model"):
        compress(options)


def test_zero_and_tiny_experts_are_exact_or_stay_dense(base: Path, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = tmp_path / "model"
    shutil.copytree(base, model)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "initializer_range": 0.1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    ids = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    MixtralForCausalLM(MixtralConfig(**shape, **heads, **ids)).save_pretrained(model)
    experts = f"{FIRST}block_sparse_moe.experts"
    tensors = load_file(model / "model.safetensors")
    times(f"{experts}.0.w3", 0)(tensors)
    times(f"{experts}.1.w3", 1e-40)(tensors)
    times(f"{experts}.2", 1e-30)(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    options = options_for(base, model, include=("experts",), ratio=0.1)
    compress(options, say=said.append)
    check_data(open_checkpoint(options.output))
    assert any(f"stay dense, since {SILENT}: {experts}.0.w2" in line for line in said)
    found = factored(options.output)
    assert not reconstruct(found[f"{experts}.0.w3"]).any()
    assert f"{experts}.0.w1" not in found
