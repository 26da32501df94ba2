"""How much knowledge distillation a run gets, and what leaves it out."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pgsvd_vllm.cli.compress import amount, configure
from pgsvd_vllm.errors import InputError, bytes_text
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.calibration_set import with_data_defaults
from pgsvd_vllm.offline.data.sampled.self_text import Machine
from pgsvd_vllm.offline.data.text import load_tokenizer
from pgsvd_vllm.offline.data.tokens import tokenize
from pgsvd_vllm.offline.options import (
    CALIBRATION_FLOPS,
    CPU_WINDOWS,
    DISTILLED_PASSES,
    DISTILLED_TOKENS,
    GENEROUS_WINDOWS,
    GPU_FLOPS,
    GPU_GROWTH,
    HELD_OUT,
    STEP_TOKENS,
    WINDOWS,
    CompressOptions,
    Dose,
)
from pgsvd_vllm.offline.output.messages import describe
from pgsvd_vllm.offline.planning import fit_memory
from pgsvd_vllm.offline.planning.dose import CPU_FLOPS, FLOPS_PER_PARAMETER, LEAST_TOKENS, dose_of
from pgsvd_vllm.offline.planning.memory import stage_bytes
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import prepare
from pgsvd_vllm.offline.refine.distill import Distiller

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48, "ratio": 0.3}
DEFAULT = Dose(tokens=DISTILLED_TOKENS, by_default=True)
GPU_DEFAULT = Dose(tokens=GPU_GROWTH * DISTILLED_TOKENS, by_default=True)


def model(parameters: float = 1e8, reads_images: bool = False, unstacks_experts: bool = False) -> Any:
    """What the defaults read of a model."""
    weights = SimpleNamespace(numel=int(parameters))
    generates = SimpleNamespace(can_generate=lambda: True)
    return SimpleNamespace(
        weights=weights, reads_images=reads_images, unstacks_experts=unstacks_experts, model=generates
    )


def options(**values: Any) -> CompressOptions:
    return CompressOptions("m", Path("o"), **values)


def numbers(model: Path, folder: Path) -> tuple[Path, int]:
    """A text file, and its tokens."""
    text = " ".join(map(str, range(4000)))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder / "text.txt", len(tokenize(load_tokenizer(model), [text], "t").ids)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, GPU_DEFAULT),
        ({"sensitivity": "measured"}, GPU_DEFAULT),
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
    assert dose_of(options(refine=1), model(1e11), "cpu") == Dose(minutes=1)


def test_a_gpu_trains_longer_as_far_as_ten_minutes_allow() -> None:
    assert dose_of(options(), model(1e10), "cuda") == GPU_DEFAULT
    assert dose_of(options(), model(4e10), "cuda") == Dose(
        tokens=int(GPU_FLOPS / FLOPS_PER_PARAMETER / 4e10), by_default=True
    )
    assert dose_of(options(), model(1e12), "cuda") == DEFAULT


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


@pytest.mark.parametrize(("spare", "distilled"), [(HELD_OUT - 1, False), (HELD_OUT, True)])
def test_the_default_takes_no_calibration_windows_away(
    spare: int, distilled: bool, tiny_model: Path, tmp_path: Path
) -> None:
    text, tokens = numbers(tiny_model, tmp_path)
    given: dict[str, Any] = {
        "dataset": (str(text),),
        "num_calibration_samples": 30,
        "max_seq_length": tokens // (30 + spare),
    }
    default, without = (
        make_plan(CompressOptions(str(tiny_model), tmp_path / "o", refine=refine, **given)) for refine in (None, 0)
    )
    assert default.data.windows.ids.equal(without.data.windows.ids)
    assert len(default.data.windows.ids) == 30
    assert without.settings.dose is None
    assert (default.settings.dose is not None) == distilled
    line = f"\nWARNING: no distillation: the text has fewer than {HELD_OUT} windows beside the calibration windows"
    assert (line in describe(default)) != distilled
    assert "distillation" not in describe(without)


@pytest.mark.parametrize(("windows", "held_out"), [(GENEROUS_WINDOWS - 1, 0), (GENEROUS_WINDOWS, HELD_OUT)])
def test_texts_that_are_long_enough_are_held_out_in_part(
    windows: int, held_out: int, tiny_model: Path, tmp_path: Path
) -> None:
    text, tokens = numbers(tiny_model, tmp_path)
    given: dict[str, Any] = {
        "dataset": (str(text),),
        "num_calibration_samples": windows,
        "max_seq_length": tokens // windows,
    }
    # All methods share one calibration.
    methods: tuple[dict[str, Any], ...] = ({}, {"refine": 0}, {"baseline": "svd"}, {"sensitivity": "forward"})
    plans = [make_plan(CompressOptions(str(tiny_model), tmp_path / "o", **given, **method)) for method in methods]
    for plan in plans:
        assert len(plan.data.windows.ids) == windows - held_out
        assert len(plan.data.windows.others) == held_out
        assert plan.data.sha256 == plans[0].data.sha256
    assert [plan.settings.dose is not None for plan in plans] == [bool(held_out), False, False, False]


@pytest.mark.parametrize(
    ("device", "parameters", "values", "expected"),
    [
        ("cpu", 1e8, {}, CPU_WINDOWS),
        ("cpu", 1e8, {"dataset": ("c4",)}, None),
        ("cuda", 1e8, {}, GPU_GROWTH * WINDOWS),
        ("cuda", 1e8, {"dataset": ("c4",)}, GPU_GROWTH * WINDOWS),
        ("cuda", 7e9, {}, int(GPU_FLOPS / (CALIBRATION_FLOPS * 7e9 * 1024))),
        ("cuda", 7e10, {}, WINDOWS),
        ("cuda", 1e8, {"num_calibration_samples": 7}, 7),
    ],
)
def test_the_number_of_windows_follows_the_machine(
    device: str, parameters: float, values: dict[str, Any], expected: int | None
) -> None:
    machine = Machine(torch.device(device), torch.bfloat16, None)
    assert with_data_defaults(options(**values), model(parameters), machine).num_calibration_samples == expected
    images = with_data_defaults(options(**values), model(parameters, reads_images=True), machine)
    given = values.get("num_calibration_samples")
    assert images.num_calibration_samples == (given if device == "cuda" else expected)


@pytest.mark.parametrize(("samples", "fresh"), [(20, 10), (2000, 427)])
def test_the_default_samples_few_windows_of_its_own(samples: int, fresh: int, tiny_model: Path, tmp_path: Path) -> None:
    """A fifth of the amount, or half as many as the calibration windows; nothing is sampled here."""
    given: dict[str, Any] = {"num_calibration_samples": samples, "max_seq_length": 48}
    windows = make_plan(CompressOptions(str(tiny_model), tmp_path / "o", **given)).data.windows
    assert len(windows.ids) == samples
    assert len(windows.others) == HELD_OUT + fresh
    mixed = CompressOptions(str(tiny_model), tmp_path / "o", dataset=("python-docs", "self"), **given)
    windows = make_plan(mixed).data.windows
    assert len(windows.ids) == samples
    assert windows.name == "python-docs + self"


def test_a_run_says_and_records_its_distillation(tiny_model: Path, tmp_path: Path) -> None:
    plan = make_plan(CompressOptions(str(tiny_model), tmp_path / "o", **SMALL))
    windows = plan.data.windows
    every = DISTILLED_PASSES * 48 * (len(windows.ids) + len(windows.others) - HELD_OUT)
    for refine, tokens, expected in ((0, None, None), (None, 96, 96), (None, None, every)):
        lines: list[str] = []
        output = tmp_path / f"{expected}"
        compress(CompressOptions(str(tiny_model), output, refine=refine, refine_tokens=tokens, **SMALL), lines.append)
        said = [line for line in lines if line.startswith("distilled: ")]
        # Steps have as many windows as fill 1024 tokens.
        steps = 1 if expected == 96 else DISTILLED_PASSES * -(-windows.trained // 48 // (STEP_TOKENS // 48))
        assert [int(line.split()[1]) for line in said] == ([] if expected is None else [steps])
        assert (f"\ndistillation: {expected} tokens" in lines[0]) == (expected is not None)
        assert recorded(output) == expected


def recorded(output: Path) -> int | None:
    """The tokens of distillation in config.json."""
    section = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["refine_minutes"] is None
    return section["refine_tokens"]


def test_the_default_is_left_out_where_memory_is_short(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps that, and so do its text and its sensitivities."""
    asked = CompressOptions(str(tiny_model), tmp_path / "out", **SMALL)
    whole, without = make_plan(asked), make_plan(CompressOptions(str(tiny_model), tmp_path / "out", refine=0, **SMALL))
    needed = stage_bytes(whole)["distillation"]
    monkeypatch.setattr(fit_memory, "available", lambda plan: needed - 1 if plan.settings.dose else 2**40)
    lines: list[str] = []
    plan = prepare(asked, lines.append)
    shown, least = (bytes_text(needed - less) for less in (0, 1))
    assert lines == [f"WARNING: distillation needs about {shown} of memory, {least} are available: it is left out"]
    assert plan.settings == without.settings
    stopped(asked)
    monkeypatch.undo()
    resumed = CompressOptions(str(tiny_model), tmp_path / "out", resume=True, **SMALL)
    assert prepare(resumed, lines.append).settings.dose is None
    compress(resumed)
    assert recorded(tmp_path / "out") is None


@pytest.mark.parametrize("begun", ["calibration folder", "resumed run"])
def test_memory_is_checked_again_where_the_sensitivities_are_settled(
    begun: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed for lack of memory would be killed again."""
    folder = tmp_path / "shared" if begun == "calibration folder" else None
    asked = CompressOptions(str(tiny_model), tmp_path / "out", calibration=folder, **SMALL)
    assert stopped(asked).settings.dose is not None
    monkeypatch.setattr(fit_memory, "free_memory", lambda _device: 0)
    lines: list[str] = []
    plan = prepare(replace(asked, resume=folder is None), lines.append)
    assert (plan.settings.dose, plan.settings.sensitivity) == (None, "measured")
    assert [line.partition(" needs")[0] for line in lines] == ["WARNING: distillation", "WARNING: the stage factors"]


def test_a_choice_without_distillation_does_not_outlive_its_options(tiny_model: Path, tmp_path: Path) -> None:
    asked = CompressOptions(str(tiny_model), tmp_path / "out", refine=0, **SMALL)
    assert stopped(asked).settings.dose is None
    assert prepare(replace(asked, refine=None, resume=True), lambda _line: None).settings.dose is not None


def stopped(asked: CompressOptions) -> Plan:
    """Interrupt a run after its calibration; returns its plan."""
    plans: list[Plan] = []

    def stop(line: str) -> None:
        if line.startswith("ranks by"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(asked, stop, plans.append)
    return plans[0]


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
    assert "WARNING: distillation is left out (MemoryError: none is free)" in lines
    assert recorded(default.output) is None
    found, expected = (load_file(next(o.output.glob("*.safetensors"))) for o in (default, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match="not enough memory"):
        compress(CompressOptions(str(tiny_model), tmp_path / "asked", refine=1, **SMALL))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15", (15.0, None)),
        ("0.5", (0.5, None)),
        ("0", (0.0, None)),
        ("500k", (None, 500_000)),
        ("1.5M", (None, 1_500_000)),
    ],
)
def test_an_amount_is_minutes_or_tokens(text: str, expected: tuple[float | None, int | None]) -> None:
    assert amount(text) == expected
    parser = argparse.ArgumentParser()
    configure(parser)
    assert parser.parse_args(["m", "-o", "o", "--refine", text]).refine == expected
    assert parser.parse_args(["m", "-o", "o", "--refine"]).refine == (20.0, None)
    assert parser.parse_args(["m", "-o", "o"]).refine == (None, None)
