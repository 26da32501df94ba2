"""`pareto` measures many sizes from one calibration, continues, and marks the front."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.evaluation.perplexity import held_out_prose, perplexity, spread_windows
from pgsvd_vllm.format.latency_table import LatencyTable, ShapeLatencies, write_latencies
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.data.text import load_tokenizer
from pgsvd_vllm.report.sweep_report import front_of

FEW = ("--num-calibration-samples", "32", "--max-seq-length", "64", "--dataset", "python-docs")


def run(model: Path, folder: Path, *options: str) -> int:
    return main(["pareto", str(model), "-o", str(folder), *FEW, "--num-samples", "4", *options])


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(tiny_model, folder, "--ratios", "0.4", "0.2", "--methods", "pgsvd", "svd") == 0
    torch.set_num_threads(threads)
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "pareto.json").read_text())["cases"]


def test_values_are_those_of_a_compressed_model(
    swept: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    rows = rows_of(swept)
    assert list(rows) == ["dense 0.0", "pgsvd 0.2", "svd 0.2", "pgsvd 0.4", "svd 0.4"]
    assert run(tiny_model, swept, "--ratios", "0.4", "--methods", "pgsvd") == 0
    (printed,) = re.findall(r"compress one of them:  pgsvd-vllm (.*)", capsys.readouterr().out)
    line = [{"DIR": str(tmp_path / "out"), "R": "0.4"}.get(word, word) for word in shlex.split(printed)]
    assert main([*line, "--no-sequential", "--refine", "0"]) == 0
    windows = spread_windows(load_tokenizer(tiny_model), [held_out_prose()], 4, 64)
    row = rows["pgsvd 0.4"]
    for folder, value in ((tiny_model, rows["dense 0.0"]["perplexity"]), (tmp_path / "out", row["perplexity"])):
        assert perplexity(AutoModelForCausalLM.from_pretrained(folder), windows) == pytest.approx(value, rel=1e-6)
    assert row["multiple"] == pytest.approx(row["perplexity"] / rows["dense 0.0"]["perplexity"])
    assert row["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert row["removed"] == pytest.approx(0.4, abs=0.01)
    assert row["predicted"] > rows["pgsvd 0.2"]["predicted"] > 0
    assert rows["svd 0.4"]["predicted"] is None


def test_pages_and_charts_are_written(swept: Path) -> None:
    page = (swept / "pareto.html").read_text()
    assert "on the front" in page
    notes = set(re.findall(r"(\w+), (\d\d)% removed", page))
    assert {method for method, _ in notes} == {"pgsvd", "svd"}
    assert {path.name for path in swept.iterdir()} == {
        *("pareto.json", "pareto.html", "calibration"),
        *("pareto-removed.svg", "pareto-bytes.svg", "pareto-predicted.svg"),
    }


def test_more_sizes_use_the_same_calibration(swept: Path, tiny_model: Path, one_thread: None) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "calibration").rglob("*.safetensors")}
    old = rows_of(swept)
    assert run(tiny_model, swept, "--ratios", "0.2", "0.3", "--methods", "pgsvd") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "calibration").rglob("*.safetensors")}
    found = rows_of(swept)
    assert {name: found[name] for name in old} == old
    assert found["pgsvd 0.2"]["predicted"] < found["pgsvd 0.3"]["predicted"] < found["pgsvd 0.4"]["predicted"]


def test_a_size_that_is_out_of_reach_is_named_every_time(
    swept: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    for _ in range(2):
        assert run(tiny_model, swept, "--ratios", "0.2", "0.999", "--methods", "pgsvd") == 0
        assert "WARNING: pgsvd 99.9%: --ratios 0.999" in capsys.readouterr().out
    assert "pgsvd 0.999" not in rows_of(swept)


def test_every_size_that_was_measured_is_shown(swept: Path, tiny_model: Path) -> None:
    assert run(tiny_model, swept, "--ratios", "0.2", "--methods", "svd") == 0
    page = (swept / "pareto.html").read_text()
    assert page.count("<td>pgsvd</td>") >= 2
    assert (swept / "pareto-predicted.svg").is_file()


def test_published_files_name_no_paths(swept: Path, tiny_model: Path) -> None:
    for name in ("pareto.json", "pareto.html"):
        assert str(tiny_model.parent) not in (swept / name).read_text()


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (("--ratios", "1.5"), "--ratios 1.5"),
        (("--num-samples", "1"), "--num-samples 1"),
        (("--seed", "3"), "made with another --seed"),
        (("--tasks", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--limit", "0"), "--limit 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_named(
    options: tuple[str, ...], culprit: str, swept: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model, swept, *options) == 2
    assert culprit in capsys.readouterr().err


def test_the_front_is_what_nothing_beats() -> None:
    points = [(10, 1.0), (8, 1.1), (8, 1.2), (6, 1.1), (7, None), (5, 3.0)]
    rows = [{"bytes": size, "multiple": multiple} for size, multiple in points]
    assert front_of(rows) == {0, 3, 5}


def test_a_text_that_is_missing_is_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    assert run(tiny_model, tmp_path / "out", "--eval-dataset", str(tmp_path / "absent.txt")) == 2
    assert f"--eval-dataset {tmp_path / 'absent.txt'}: no such file" in capsys.readouterr().err


def test_gemm_times_are_those_of_the_table(tiny_model: Path, tmp_path: Path, one_thread: None) -> None:
    shapes = {(128, 128), (64, 128), (320, 128), (128, 320)}
    forms = {form: [(1, 1.0), (64, 3.0)] for form in ("pivot", "factors")}
    table = LatencyTable({shape: ShapeLatencies(2.0, forms) for shape in shapes}, 1, "float32", "a machine")
    write_latencies(table, tmp_path / "costs.json")
    options = ("--ratios", "0.4", "--methods", "svd", "--costs", str(tmp_path / "costs.json"))
    assert run(tiny_model, tmp_path / "out", *options) == 0
    rows = rows_of(tmp_path / "out")
    assert rows["dense 0.0"]["gemm_time"] == 1.0
    compress = ["compress", str(tiny_model), "-o", str(tmp_path / "c"), "--ratio", "0.4", "--baseline", "svd", *FEW]
    assert main(compress) == 0
    ranks = [module.rank for module in open_checkpoint(tmp_path / "c").modules.values()]
    expected = sum(min(1 + 2 * (rank - 1) / 63, 3.0) for rank in ranks) + 2.0 * (21 - len(ranks))
    assert rows["svd 0.4"]["gemm_time"] == pytest.approx(expected / (2.0 * 21))
    assert (tmp_path / "out" / "pareto-time.svg").is_file()
