"""How much knowledge distillation a run gets, and what leaves it out."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.text import load_tokenizer
from pgsvd_vllm.offline.data.tokens import tokenize
from pgsvd_vllm.offline.options import DISTILLED_PASSES, DISTILLED_TOKENS, HELD_OUT, CompressOptions, Dose
from pgsvd_vllm.offline.output.messages import describe
from pgsvd_vllm.offline.planning import resources
from pgsvd_vllm.offline.planning.dose import CPU_FLOPS, FLOPS_PER_PARAMETER, LEAST_TOKENS, dose_of
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.prepare import prepare
from pgsvd_vllm.offline.planning.resources import memory_bytes
from pgsvd_vllm.offline.refine.distill import Distiller

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}
DEFAULT = Dose(tokens=DISTILLED_TOKENS, by_default=True)


def model(parameters: float = 1e8, reads_images: bool = False, unstacks_experts: bool = False) -> Any:
    """What `dose_of` reads of a model."""
    weights = SimpleNamespace(numel=int(parameters))
    return SimpleNamespace(weights=weights, reads_images=reads_images, unstacks_experts=unstacks_experts)


def options(**values: Any) -> CompressOptions:
    return CompressOptions("m", Path("o"), **values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, DEFAULT),
        ({"sensitivity": "measured"}, DEFAULT),
        ({"sensitivity": "forward"}, None),
        ({"sensitivity": "uniform"}, None),
        ({"tolerance": 0.1}, None),
        ({"baseline": "svd"}, None),
        ({"refine": 0}, None),
        ({"refine": 3}, Dose(minutes=3)),
        ({"refine": 3, "baseline": "svd"}, Dose(minutes=3)),
        ({"refine_tokens": 5000}, Dose(tokens=5000)),
    ],
)
def test_the_default_is_for_measured_losses(values: dict[str, Any], expected: Dose | None) -> None:
    assert dose_of(options(**values), model(), "cuda") == expected


def test_a_cpu_trains_large_models_less() -> None:
    assert dose_of(options(), model(1e8), "cpu") == DEFAULT
    assert dose_of(options(), model(1e9), "cpu") == Dose(
        tokens=int(CPU_FLOPS / FLOPS_PER_PARAMETER / 1e9), by_default=True
    )
    assert dose_of(options(), model(CPU_FLOPS / FLOPS_PER_PARAMETER / LEAST_TOKENS + 1e6), "cpu") is None
    assert dose_of(options(), model(1e11), "cuda") == DEFAULT
    assert dose_of(options(refine=1), model(1e11), "cpu") == Dose(minutes=1)


@pytest.mark.parametrize("kind", ["reads_images", "unstacks_experts"])
def test_models_that_cannot_be_trained_are_refused_only_on_request(kind: str) -> None:
    untrained = model(**{kind: True})
    assert dose_of(options(), untrained, "cuda") is None
    assert dose_of(options(refine=0), untrained, "cuda") is None
    for values in ({"refine": 1}, {"refine_tokens": 1000}):
        with pytest.raises(InputError, match="--refine: "):
            dose_of(options(**values), untrained, "cuda")


def test_the_default_makes_few_passes() -> None:
    assert DEFAULT.on(1000).tokens == DISTILLED_PASSES * 1000
    assert DEFAULT.on(10**9) == DEFAULT
    assert Dose(tokens=10**6).on(1000).tokens == 10**6
    assert Dose(minutes=2).on(1000) == Dose(minutes=2)


def test_one_amount_alone() -> None:
    with pytest.raises(InputError, match="give only one"):
        make_plan(options(refine=1, refine_tokens=1000))


@pytest.mark.parametrize(("windows", "held_out"), [(39, 0), (41, HELD_OUT)])
def test_a_short_text_is_not_shared_with_held_out_windows(
    windows: int, held_out: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Nor does a long one depend on distillation."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(4000))), encoding="utf-8")
    tokens = len(tokenize(load_tokenizer(tiny_model), [text.read_text(encoding="utf-8")], "t").ids)
    given: dict[str, Any] = {
        "dataset": (str(text),),
        "max_seq_length": tokens // windows,
        "num_calibration_samples": 99,
    }
    plans = [
        make_plan(CompressOptions(str(tiny_model), tmp_path / "o", refine=refine, **given)) for refine in (None, 0)
    ]
    assert len(plans[0].data.windows.others) == held_out
    assert (plans[0].settings.dose is not None) == bool(held_out)
    assert plans[1].settings.dose is None
    assert plans[0].data.sha256 == plans[1].data.sha256


def test_a_run_says_and_records_its_distillation(tiny_model: Path, tmp_path: Path) -> None:
    plan = make_plan(CompressOptions(str(tiny_model), tmp_path / "o", **SMALL))
    text = plan.data.windows.ids.numel() + plan.data.windows.others.numel()
    assert f"\ndistillation: {DISTILLED_PASSES * text} tokens" in describe(plan)
    for refine, tokens in ((0, None), (None, 96)):
        lines: list[str] = []
        asked = CompressOptions(str(tiny_model), tmp_path / f"{refine}", refine=refine, refine_tokens=tokens, **SMALL)
        compress(asked, say=lines.append)
        assert any(line.startswith("distilled: 2 steps") for line in lines) == (tokens is not None)
        assert ("distillation: 96 tokens" in lines[0]) == (tokens is not None)
        section = json.loads((asked.output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert (section["refine_minutes"], section["refine_tokens"]) == (None, tokens)


def test_the_default_is_left_out_where_memory_is_short(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps that, and so do its text and its sensitivities."""
    asked = CompressOptions(str(tiny_model), tmp_path / "out", **SMALL)
    whole, without = make_plan(asked), make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=0, **SMALL))
    loaded = sum(parameter.nbytes for parameter in whole.source.model.parameters() if not parameter.is_meta)
    free = memory_bytes(without) - loaded + 2**17  # for held-out text that an earlier run has sampled
    monkeypatch.setattr(resources, "free_memory", lambda _device: free)
    lines: list[str] = []
    plan = prepare(asked, lines.append)
    needed = bytes_text(memory_bytes(whole) - loaded)
    assert lines == [f"distillation needs about {needed} of memory, {bytes_text(free)} are free: it is left out"]
    assert plan.settings == without.settings

    def stop(line: str) -> None:
        if line.startswith("ranks by"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(asked, say=stop)
    monkeypatch.undo()
    resumed = CompressOptions(str(tiny_model), tmp_path / "out", resume=True, **SMALL)
    assert prepare(resumed, lines.append).settings.dose is None
    compress(resumed)
    section = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["refine_tokens"] is None


def test_the_default_is_left_out_where_it_fails(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for it is not."""
    plain = CompressOptions(str(tiny_model), tmp_path / "plain", refine=0, **SMALL)
    compress(plain)

    def failing(*_: object) -> None:
        raise MemoryError("none is free")

    monkeypatch.setattr(Distiller, "run", failing)
    default = CompressOptions(str(tiny_model), tmp_path / "default", **SMALL)
    lines: list[str] = []
    compress(default, say=lines.append)
    assert "WARNING: distillation is left out (none is free)" in lines
    found, expected = (load_file(next(o.output.glob("*.safetensors"))) for o in (default, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match="not enough memory"):
        compress(CompressOptions(str(tiny_model), tmp_path / "asked", refine=1, **SMALL))
