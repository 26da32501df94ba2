"""profile, and compress --objective latency: ranks chosen by measured GEMM latency."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pgsvd_vllm.cli import main
from pgsvd_vllm.cli.computed_latency import computed_latencies
from pgsvd_vllm.format.latency_table import (
    LatencyTable,
    ShapeLatencies,
    ranks_of_table,
    read_latencies,
    write_latencies,
)
from pgsvd_vllm.kernels.gpu_cost import GPUS, dense, factored
from pgsvd_vllm.kernels.layer_shape import ShardShape
from pgsvd_vllm.offline.model.device import gemm_dtype
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.conftest import run_cli

# (out, in) of the tiny model's projections.
SHAPES = {(128, 128), (64, 128), (320, 128), (128, 320)}
FAST = ("--num-calibration-samples", "32", "--max-seq-length", "64", "--dtype", "float32")


@pytest.fixture
def cpu_vllm() -> None:
    platforms = pytest.importorskip("vllm.platforms", reason="vLLM is not installed")
    if not platforms.current_platform.is_cpu():
        pytest.skip("profile supports CPUs only")


def low_rank_faster_for(fast: set[tuple[int, int]]) -> LatencyTable:
    """A table in which low-rank GEMMs of some shapes are faster than dense ones at every rank, and others slower."""
    shapes = {}
    for out, width in SHAPES:
        step = 0.5 / min(out, width) if (out, width) in fast else 2.0
        points = [(1, 100 * step), (min(out, width) - 1, 100 * step * (min(out, width) - 1))]
        shapes[out, width] = ShapeLatencies(100.0, {"factors": points, "pivot": points})
    return LatencyTable(shapes, 1, "float32", "a machine")


@pytest.mark.usefixtures("cpu_vllm")
def test_profile_measures_every_shape(tiny_model: Path, tmp_path: Path) -> None:
    # An emulated dtype would make the latency of small GEMMs depend on their size instead of their number.
    dtype = str(gemm_dtype(torch.device("cpu"), torch.bfloat16)).removeprefix("torch.")
    done = run_cli("profile", tiny_model, "-o", tmp_path / "costs.json", "--tokens", "3", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    table = read_latencies(tmp_path / "costs.json")
    assert (table.tokens, table.dtype) == (3, dtype)
    assert set(table.shapes) == SHAPES
    for (out, width), latencies in table.shapes.items():
        pivot = [r for r in range(1, min(out, width)) if r * width + (out - r) * r + r < out * width]
        most = {"factors": (out * width - 1) // (out + width), "pivot": pivot[-1]}
        for form, points in latencies.forms.items():
            ranks = [rank for rank, _ in points]
            assert ranks[0] == 1
            assert ranks[-1] == most[form]
            # So small GEMMs are all overhead: two take about twice as long as the dense one, or less with narrow
            # vector instructions.
            assert all(0.1 * latencies.dense < latency < 100 * latencies.dense for _, latency in points)
    assert f"wrote {tmp_path / 'costs.json'}: 4 shapes, 3 tokens" in done.stdout


def test_projections_that_get_no_faster_stay_dense(tiny_model: Path, tmp_path: Path) -> None:
    write_latencies(low_rank_faster_for({(320, 128)}), tmp_path / "costs.json")
    done = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "out", "--ratio", "0.2", *FAST),
        *("--objective", "latency", "--costs", tmp_path / "costs.json"),
    )
    assert done.returncode == 0, done.stderr
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.rpartition(".")[2] for name in section["modules"]} == {"gate_proj", "up_proj"}
    # Seven projections a layer, each 100 us when dense, three layers.
    removed = sum(1 - 0.5 * row["rank"] / 128 for row in section["modules"].values()) / 21
    assert section["time_removed"] == pytest.approx(removed, abs=1e-6)
    assert abs(removed - 0.2) < 0.02
    assert f"{removed:.1%} of their latency for 1 token (a machine)" in done.stdout
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_target_latency_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    """21 projections of 100 us each; 1.9 ms leave at least 9.5 % to remove."""
    write_latencies(low_rank_faster_for({(320, 128)}), tmp_path / "costs.json")
    given = ("--costs", tmp_path / "costs.json", "--refine", "0", "--dataset", "python-docs", *FAST)
    done = run_cli("compress", tiny_model, "-o", tmp_path / "out", "--target-latency", "1.9", *given)
    assert done.returncode == 0, done.stderr
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    time = sum(100 * (0.5 * row["rank"] / 128 if row else 1) for row in section["modules"].values())
    time += 100 * (21 - len(section["modules"]))
    assert 1850 < time <= 1900
    assert section["time_removed"] == pytest.approx(1 - time / 2100, abs=1e-6)


def test_ignored_projections_count_as_kept_latency(tiny_model: Path, tmp_path: Path) -> None:
    write_latencies(low_rank_faster_for({(320, 128)}), tmp_path / "costs.json")
    done = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "out", "--ratio", "0.1", "--ignore", "*.gate_proj", *FAST),
        *("--objective", "latency", "--costs", tmp_path / "costs.json", "--sensitivity", "forward"),
    )
    assert done.returncode == 0, done.stderr
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.rpartition(".")[2] for name in section["modules"]} == {"up_proj"}
    removed = sum(1 - 0.5 * row["rank"] / 128 for row in section["modules"].values()) / 21
    assert section["time_removed"] == pytest.approx(removed, abs=1e-6)


def test_the_size_objective_reports_no_latency(tiny_compressed: Path) -> None:
    section = json.loads((tiny_compressed / "config.json").read_text())["quantization_config"]
    assert section["time_removed"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "latency"], "--objective latency and --costs FILE go together"),
        (["--costs", "COSTS"], "--objective latency and --costs FILE go together"),
        (["--objective", "latency", "--costs", "absent.json"], "--costs absent.json: no such file"),
        (["--objective", "latency", "--costs", "OTHER"], "--costs: no latencies for weights of 128 x 128"),
        (["--objective", "latency", "--costs", "COSTS", "--dtype", "bfloat16"], "latencies of float32; make it with"),
        (["--objective", "latency", "--costs", "COSTS", "--baseline", "svd"], "--objective latency"),
        (["--objective", "latency", "--costs", "COSTS", "--tolerance", "0.2"], "--objective latency"),
        (["--objective", "latency", "--costs", "COSTS", "--sensitivity", "uniform"], "not --sensitivity uniform"),
        (["--target-latency", "1"], "--target-latency: needs the latencies of the serving machine, --costs FILE"),
        (["--target-latency", "1", "--costs", "COSTS", "--bits", "8"], "--target-latency: the latency table has GEMMs"),
        (["--target-latency", "1", "--costs", "COSTS", "--bits", "auto"], "--bits auto: is about size; omit --costs"),
        (["--target-latency", "-1", "--costs", "COSTS"], "--target-latency -1.0: must be a positive number of milli"),
        (["--target-latency", "2.1", "--costs", "COSTS"], "all projections take 2.1 ms when dense (tokens: 1)"),
    ],
)
def test_invalid_latency_options_are_refused(
    options: list[str], message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = low_rank_faster_for(set())
    write_latencies(table, tmp_path / "COSTS")
    write_latencies(
        LatencyTable({(3, 5): ShapeLatencies(1.0, table.shapes[128, 128].forms)}, 1, "float32", "m"), tmp_path / "OTHER"
    )
    options = [str(tmp_path / text) if text in ("COSTS", "OTHER") else text for text in options]
    assert main(["compress", str(tiny_model), "-o", str(tmp_path / "out"), *FAST, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("fast", "message"),
    [
        (set(), "no low-rank GEMM is clearly faster than the dense one"),
        ({(320, 128)}, "--ratio 0.3: more than this model can give; the smallest factors remove 28.5% of the proj"),
    ],
)
def test_an_unreachable_latency_ratio_is_refused(
    fast: set[tuple[int, int]], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    write_latencies(low_rank_faster_for(fast), tmp_path / "costs.json")
    done = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "out", "--ratio", "0.3", *FAST),
        *("--objective", "latency", "--costs", tmp_path / "costs.json"),
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_an_unreachable_target_latency_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    write_latencies(low_rank_faster_for({(320, 128)}), tmp_path / "costs.json")
    given = ("--costs", tmp_path / "costs.json", "--dataset", "python-docs", *FAST)
    done = run_cli("compress", tiny_model, "-o", tmp_path / "out", "--target-latency", "1", *given)
    assert done.returncode == 2
    # 6 of 21 projections can be as fast as a rank of 1 makes them.
    message = "--target-latency 1 ms: the least that this model can have is 1.5 ms; raise it"
    assert message in done.stderr


@pytest.mark.usefixtures("cpu_vllm")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: must be a number of tokens from 1"),
        (["-o", "/"], "--output /: is a folder"),
        (["-o", "absent/costs.json"], "--output absent/costs.json: cannot be written"),
    ],
)
def test_profile_refuses_invalid_options(
    options: list[str], message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(tiny_model), "-o", str(tmp_path / "costs.json"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def projections_of_llama(layers: int) -> list[Projection]:
    """The projections of Llama-2-7B's first layers, in their order."""
    sizes = {"self_attn": {"q": 4096, "k": 4096, "v": 4096, "o": 4096}, "mlp": {"gate": 11008, "up": 11008}}
    found = [
        Projection(f"model.layers.{i}.{part}.{leaf}_proj", out, 4096)
        for i in range(layers)
        for part, leaves in sizes.items()
        for leaf, out in leaves.items()
    ]
    return [*found, *(Projection(f"model.layers.{i}.mlp.down_proj", 4096, 11008) for i in range(layers))]


@pytest.mark.parametrize("tokens", [1, 512])
def test_a_computed_table_adds_up_to_the_time_of_the_layers(tokens: int) -> None:
    """The projections of a merged layer share its fixed time; o_proj, which has q_proj's shape, has one of its own."""
    projections = projections_of_llama(2)
    table = computed_latencies("H100", projections, tokens, "bfloat16")
    gpu, layers = GPUS["H100"], (((4096,) * 3, 4096), ((4096,), 4096), ((11008,) * 2, 4096), ((4096,), 11008))
    found = sum(table.latency(p.out_features, p.in_features, "factors", None) for p in projections)
    assert found == pytest.approx(2 * sum(dense(gpu, tokens, *layer) for layer in layers), abs=0.1)
    for form in ("factors", "pivot"):
        most = {p.name: ranks_of_table(form, p.out_features, p.in_features)[-1] for p in projections}
        found = sum(table.latency(p.out_features, p.in_features, form, most[p.name]) for p in projections)
        expected = 0.0
        for outs, columns in layers:
            ranks = [ranks_of_table(form, out, columns)[-1] for out in outs]
            shards = [ShardShape(o, r, r if form == "pivot" else None) for o, r in zip(outs, ranks, strict=True)]
            expected += 2 * factored(gpu, tokens, shards, columns)
        assert found == pytest.approx(expected, abs=0.2)


def test_a_model_for_gpus_has_plain_factors(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs, small = tmp_path / "costs.json", [*FAST[:4], "--dataset", "python-docs", "--refine", "0", "--dry-run"]
    assert main(["profile", str(tiny_model), "-o", str(costs), "--gpu", "H100", "--dtype", "float16"]) == 0
    assert "4 shapes, 1 token, float16, NVIDIA H100, computed" in capsys.readouterr().out
    assert read_latencies(costs).device == "gpu"
    given = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), *small]
    # Layers this small gain nothing on a GPU.
    assert main([*given, "--dtype", "float16", "--objective", "latency", "--costs", str(costs)]) == 2
    assert "no low-rank GEMM is clearly faster" in capsys.readouterr().err
    for option, line in (("gpu", True), ("cpu", False)):
        assert main([*given, "--serve-on", option]) == 0
        assert ("form: factors, which GPUs run faster" in capsys.readouterr().out) == line


@pytest.mark.parametrize(
    ("values", "forms"),
    [
        ({"device": "cpu"}, ["pivot"]),
        ({"serve_on": "gpu"}, ["factors"]),
        ({"serve_on": "gpu", "form": "pivot"}, ["pivot"]),
        ({"serve_on": "gpu", "baseline": "pifa"}, ["pivot"]),
        ({"serve_on": "gpu", "bits": "auto"}, ["factors"]),
        ({"serve_on": "cpu", "bits": "auto"}, ["factors", "pivot"]),
        ({"serve_on": "cpu", "sensitivity": "uniform"}, ["factors"]),
    ],
    ids=str,
)
def test_where_a_model_is_served_decides_the_default_form(
    tiny_model: Path, tmp_path: Path, values: dict[str, Any], forms: list[str]
) -> None:
    given: dict[str, Any] = {"num_calibration_samples": 32, "max_seq_length": 64, "dataset": ("python-docs",)}
    plan = make_plan(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, **given, **values))
    assert sorted({storage.form for storage in plan.settings.storages}) == forms
    assert plan.options.serve_on == values.get("serve_on", "cpu" if plan.settings.device.type == "cpu" else "gpu")


def test_inspect_says_for_what_a_checkpoint_is(tiny_compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_compressed)]) == 0
    section = json.loads((tiny_compressed / "config.json").read_text())["quantization_config"]
    count = len(section["modules"])
    form = {module["form"] for module in section["modules"].values()}.pop()
    expected = f"stored                {count} in the form {form}, for serving on {section['serve_on'].upper()}s"
    assert expected in capsys.readouterr().out
