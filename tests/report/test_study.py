"""`study` answers every question as float64 arithmetic of these tests does, continues, and finds a missed bar."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pgsvd_vllm.cli.study
import pgsvd_vllm.hf  # (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.evaluation.perplexity import held_out_prose, perplexity, spread_windows
from pgsvd_vllm.offline.data.text import load_tokenizer
from pgsvd_vllm.offline.factors.solvers import Factors, als
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.prepare import open_state, prepare
from pgsvd_vllm.offline.settings import MEASURED
from pgsvd_vllm.offline.study import solver
from pgsvd_vllm.offline.study.rows import QUESTIONS
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.e2e.vision_models import VISION_MODELS, save_vision_model
from tests.report.test_checkpoint_report import Page

FEW = ("--num-calibration-samples", "32", "--max-seq-length", "64", "--dataset", "python-docs")
RATIOS = (0.2, 0.4, 0.6)


def run(model: Path, folder: Path, *options: str) -> int:
    return main(["study", str(model), "-o", str(folder), *FEW, "--quick", "--num-samples", "4", *options])


@pytest.fixture(scope="module")
def studied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studied") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(tiny_model, folder) == 0
    torch.set_num_threads(threads)
    return folder


def rows_of(folder: Path, question: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((folder / "study.json").read_text())["rows"] if row["question"] == question]


def values_of(folder: Path, question: str, series: str) -> dict[Any, float]:
    return {row["at"]: row["value"] for row in rows_of(folder, question) if row["series"] == series}


@dataclass(frozen=True)
class Measured:
    """What the calibration measured of a projection, float64."""

    weight: np.ndarray
    gram: np.ndarray
    leader: str
    moment: np.ndarray
    mixed: np.ndarray  # second moment of the inputs, half of it weighted by gradients

    @property
    def metric(self) -> np.ndarray:
        """The damped G."""
        return self.moment + 0.1 * np.diag(self.moment).mean() * np.eye(len(self.moment))


@pytest.fixture(scope="module")
def measured(studied: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    work = tmp_path_factory.mktemp("measured") / "work"
    options = CompressOptions(str(tiny_model), work, dataset=("python-docs",), num_calibration_samples=32)
    plan = prepare(replace(options, max_seq_length=64, calibration=studied / "calibration"), print)
    state = open_state(plan)
    found = {}
    for index, row in enumerate(plan.projections.layers):
        data, gradients = state.load_layer(index), state.load_sensitivity(index, MEASURED)
        for p in row:
            gram = data.grams[data.leader[p.name]].double().numpy()
            found[p.name] = Measured(
                plan.source.weights.read(f"{p.name}.weight").double().numpy(),
                gram,
                data.leader[p.name],
                gradients.moments[p.name].double().numpy(),
                (gram / data.tokens + gradients.grams[p.name].double().numpy()) / 2,
            )
    state.discard()
    state.close()
    assert len(found) == 21
    return found


def spectrum(matrix: np.ndarray) -> np.ndarray:
    """Eigenvalues, descending, of W C W^T or of L^T W C W^T L given as a symmetric matrix or a similar one."""
    return np.sort(np.linalg.eigvals(matrix).real)[::-1].clip(0)


def output_energies(measured: dict[str, Measured]) -> dict[str, np.ndarray]:
    return {name: spectrum(m.weight @ m.gram @ m.weight.T) for name, m in measured.items()}


def loss_energies(measured: dict[str, Measured]) -> dict[str, np.ndarray]:
    return {name: spectrum(m.metric @ m.weight @ m.mixed @ m.weight.T) for name, m in measured.items()}


def tail(energy: np.ndarray, rank: int) -> float:
    return float(energy[rank:].sum())


Shapes = dict[str, tuple[int, int]]


def uniform(energies: dict[str, np.ndarray], shapes: Shapes, ratio: float) -> dict[str, int]:
    """The ranks of the tolerance whose removed share is closest, by trying every error that occurs."""
    profiles = {n: np.sqrt([tail(e, r) / e.sum() for r in range(min(shapes[n]) + 1)]) for n, e in energies.items()}

    def ranks(tolerance: float) -> dict[str, int]:
        smallest = {n: max(1, int((p > tolerance).sum())) for n, p in profiles.items()}
        return {n: r for n, r in smallest.items() if r * sum(shapes[n]) < np.prod(shapes[n])}

    tried = [ranks(t) for t in np.unique(np.concatenate(list(profiles.values())))]
    return min(tried, key=lambda found: abs(removed(found, shapes) - ratio))


def removed(ranks: dict[str, int], shapes: Shapes) -> float:
    saved = sum(np.prod(shapes[n]) - r * sum(shapes[n]) for n, r in ranks.items())
    return float(saved / sum(np.prod(shape) for shape in shapes.values()))


def front(energies: dict[str, np.ndarray], shapes: Shapes) -> list[tuple[float, float]]:
    """(removed share, loss) of the lower convex hull, from the hull of each projection's ranks."""
    steps = []
    for name, energy in energies.items():
        m, n = shapes[name]
        points = [(0.0, 0.0)]
        ranks = [r for r in range(min(m, n), 0, -1) if r * (m + n) <= 0.9 * m * n]
        for point in [(m * n - r * (m + n), 0.5 * tail(energy, r)) for r in ranks]:
            while len(points) > 1 and slope(points[-2], points[-1]) >= slope(points[-1], point):
                points.pop()
            points.append(point)
        steps += [(slope(a, b), b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]
    total = sum(np.prod(shape) for shape in shapes.values())
    corners = np.cumsum([(0.0, 0.0), *((saved / total, loss) for _, saved, loss in sorted(steps))], axis=0)
    return [(share, loss) for share, loss in corners.tolist()]


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def closest(corners: list[tuple[float, float]], ratio: float) -> tuple[float, float]:
    return min(corners, key=lambda corner: abs(corner[0] - ratio))


def shapes_of(measured: dict[str, Measured]) -> Shapes:
    return {name: m.weight.shape for name, m in measured.items()}


@pytest.mark.parametrize("series", ["squared errors", "predicted loss"])
def test_multiples_of_the_front(studied: Path, measured: dict[str, Measured], series: str) -> None:
    output, shapes = output_energies(measured), shapes_of(measured)
    energies = loss_energies(measured) if series == "predicted loss" else {n: e / e.sum() for n, e in output.items()}
    corners = front(energies, shapes)
    found = values_of(studied, "front", series)
    assert tuple(found) == RATIOS
    for ratio, value in found.items():
        ranks = uniform(output, shapes, ratio)
        paid = sum(0.5 * tail(energies[name], rank) for name, rank in ranks.items())
        assert value == pytest.approx(paid / closest(corners, removed(ranks, shapes))[1], rel=1e-4)
        assert value >= 1
    distances = values_of(studied, "front", "distance of the removed share")
    for ratio, distance in distances.items():
        assert distance == pytest.approx(abs(removed(uniform(output, shapes, ratio), shapes) - ratio), abs=1e-9)


def plain_als(weight: np.ndarray, gram: np.ndarray, rank: int, sweeps: int) -> float:
    """The relative error of the textbook iteration, from a plain SVD."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    u, v = u[:, :rank] * s[:rank], v[:rank]
    for _ in range(sweeps):
        u = weight @ gram @ v.T @ np.linalg.inv(v @ gram @ v.T)
        v = np.linalg.inv(u.T @ u) @ u.T @ weight
    rest = weight - u @ v
    return float(np.sqrt(np.trace(rest @ gram @ rest.T) / np.trace(weight @ gram @ weight.T)))


def test_excess_of_alternating_least_squares(studied: Path, measured: dict[str, Measured]) -> None:
    output, shapes = output_energies(measured), shapes_of(measured)
    ranks = uniform(output, shapes, 0.4)
    picked = [name for name in measured if name in ranks][::10]
    mean = values_of(studied, "solver", "mean excess error")
    worst = values_of(studied, "solver", "worst excess error")
    assert tuple(mean) == tuple(worst) == (1, 2, 4, 8, 16)
    for falling in (list(mean.values()), list(worst.values())):
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] > -1e-9
    for sweeps in (1, 2, 4):
        excess = []
        for name in picked:
            m = measured[name]
            optimum = np.sqrt(tail(output[name], ranks[name]) / output[name].sum())
            excess.append(plain_als(m.weight, m.gram, ranks[name], sweeps) / optimum - 1)
        # The solver starts from the SVD with a small perturbation.
        assert mean[sweeps] == pytest.approx(np.mean(excess), rel=0.05, abs=1e-6)
        assert worst[sweeps] == pytest.approx(max(excess), rel=0.05, abs=1e-6)
    assert all(row["ok"] for row in rows_of(studied, "solver") if "bar" in row)
    assert sum("bar" in row for row in rows_of(studied, "solver")) == 3


def test_cost_of_an_error(studied: Path, measured: dict[str, Measured]) -> None:
    rows = {row["case"]: row["value"] for row in rows_of(studied, "sensitivity")}
    costs = {n: 0.005 * np.trace(m.metric @ m.weight @ m.mixed @ m.weight.T) for n, m in measured.items()}
    for name, cost in costs.items():
        assert rows[f"{name}: nats for an error of 10 %"] == pytest.approx(cost, rel=1e-5)
    downs = [cost for name, cost in costs.items() if name.endswith("down_proj")]
    assert len(downs) == 3
    assert rows["mlp.down_proj: nats for an error of 10 %, mean"] == pytest.approx(np.mean(downs), rel=1e-5)
    assert rows["mlp.down_proj: nats for an error of 10 % in all"] == pytest.approx(sum(downs), rel=1e-5)
    output = output_energies(measured)
    half = [np.sqrt(tail(e, len(e) // 2) / e.sum()) for n, e in output.items() if n.endswith("q_proj")]
    assert rows["self_attn.q_proj: error at half of the full rank, mean"] == pytest.approx(np.mean(half), rel=1e-4)
    kinds = values_of(studied, "sensitivity", "kept at the optimum")
    numel = {kind: sum(m.weight.size for n, m in measured.items() if n.endswith(kind)) for kind in kinds}
    kept = sum(numel[kind] * share for kind, share in kinds.items()) / sum(numel.values())
    assert kept == pytest.approx(0.6, abs=5e-3)


def test_one_down_factor_for_projections_of_one_input(studied: Path, measured: dict[str, Measured]) -> None:
    energies, shapes = loss_energies(measured), shapes_of(measured)
    joint: dict[str, np.ndarray] = {}
    sums: Shapes = {}
    for leader in {m.leader for m in measured.values()}:
        group = {name: m for name, m in measured.items() if m.leader == leader}
        if len(group) == 1:
            (name,) = group
            joint[name], sums[name] = energies[name], shapes[name]
            continue
        inputs = np.mean([m.mixed for m in group.values()], axis=0)
        together = np.sum([m.weight.T @ m.metric @ m.weight for m in group.values()], axis=0)
        joint[leader] = spectrum(together @ inputs)
        sums[leader] = sum(m.weight.shape[0] for m in group.values()), inputs.shape[0]
        energies |= {name: spectrum(m.metric @ m.weight @ inputs @ m.weight.T) for name, m in group.items()}
    assert len(joint) == 12
    found = values_of(studied, "sharing", "factors")
    assert tuple(found) == RATIOS
    for ratio, value in found.items():
        expected = closest(front(joint, sums), ratio)[1] / closest(front(energies, shapes), ratio)[1]
        assert value == pytest.approx(expected, rel=1e-3)
    assert tuple(values_of(studied, "sharing", "pivot")) == RATIOS


def test_forward_passes_do_not_beat_the_front(studied: Path) -> None:
    found = values_of(studied, "forward", "predicted loss")
    assert tuple(found) == RATIOS
    # Corners of two fronts are not of exactly the same size.
    assert min(found.values()) > 0.995


@pytest.mark.parametrize(
    ("options", "rule", "solver"),
    [
        (("--sensitivity", "uniform"), "one tolerance", "ALS"),
        (("--baseline", "svd-llm"), "uniform ratio", "exact solution"),
    ],
    ids=["paper", "svd-llm"],
)
def test_models_are_those_of_compress(
    options: tuple[str, ...], rule: str, solver: str, studied: Path, tiny_model: Path, tmp_path: Path, one_thread: None
) -> None:
    arguments = ["--ratio", "0.4", *options, *FEW, "--calibration", str(studied / "calibration")]
    assert main(["compress", str(tiny_model), "-o", str(tmp_path / "out"), *arguments]) == 0
    windows = spread_windows(load_tokenizer(tiny_model), [held_out_prose()], 4, 64)
    models = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, tmp_path / "out"))
    dense, value = (perplexity(model, windows) for model in models)
    assert values_of(studied, "ablation", solver)[rule] == pytest.approx(value / dense, rel=1e-5)
    (row,) = (row for row in rows_of(studied, "ablation") if row["case"] == "dense, perplexity")
    assert row["value"] == pytest.approx(dense, rel=1e-6)


def test_every_rule_meets_every_solver(studied: Path) -> None:
    rules = ["uniform ratio", "one tolerance", "measured losses"]
    for series in ("ALS", "exact solution", "removed share"):
        assert list(values_of(studied, "ablation", series)) == rules
    assert all(abs(share - 0.4) < 0.02 for share in values_of(studied, "ablation", "removed share").values())
    # Both minimise one error; ALS stops half a percent above its optimum, which perplexity of random weights amplifies.
    exact = values_of(studied, "ablation", "exact solution")
    for rule, value in values_of(studied, "ablation", "ALS").items():
        assert value == pytest.approx(exact[rule], rel=0.1)
        assert value != exact[rule]


def test_stages_have_seconds(studied: Path) -> None:
    found = values_of(studied, "time", "seconds")
    rules = ("uniform ratio", "one tolerance", "measured losses")
    solvers = {f"factoring by {solver}, {rule}" for rule in rules for solver in ("ALS", "exact solution")}
    assert set(found) == {"calibration", "gradients", *(f"ranks by {rule}" for rule in rules), *solvers}
    assert all(value > 0 for value in found.values())
    assert not values_of(studied, "time", "resumed")


def test_every_question_has_a_table_and_a_chart(studied: Path) -> None:
    text = (studied / "study.html").read_text()
    page = Page(text)
    assert page.headings[:2] == ["Findings", "Bars"]
    assert len(page.headings) == 2 + len(QUESTIONS)
    assert text.count("<svg") == len(QUESTIONS)
    assert {row[0] for row in page.rows} >= set(QUESTIONS)
    value = values_of(studied, "front", "squared errors")[0.4]
    assert any(row[:2] == ["40%", f"{value:.4g}"] for row in page.rows)
    finding = f"At 40% removed one tolerance costs {value:.2f} times the front's squared errors"
    assert any(row[-1].startswith(finding) for row in page.rows)
    multiple = values_of(studied, "ablation", "ALS")["one tolerance"]
    assert any(row[0] == "one tolerance" and f"{multiple:.4g}" in row for row in page.rows)
    assert any(f"one tolerance, ALS: {multiple:.4g}" == note for note in page.notes)
    assert not [url for url in re.findall(r"https?://[^\"'\s<]+", text) if "www.w3.org" not in url]
    identities = re.findall(r'\bid="([^"]+)"', text)
    assert len(identities) == len(set(identities))


def test_published_files_name_no_paths(studied: Path, tiny_model: Path) -> None:
    assert {path.name for path in studied.iterdir()} == {"study.html", "study.json", "calibration"}
    for name in ("study.json", "study.html"):
        assert str(tiny_model.parent) not in (studied / name).read_text()


def test_a_repeated_command_measures_nothing(studied: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (studied / "study.json").read_bytes()
    monkeypatch.setattr("pgsvd_vllm.offline.planning.prepare.prepare", lambda *_: pytest.fail("reads the model"))
    assert run(tiny_model, studied) == 0
    assert (studied / "study.json").read_bytes() == before


@pytest.fixture
def calibrated(studied: Path, tmp_path: Path) -> Path:
    """A folder with the calibration and no answers."""
    folder = tmp_path / "again"
    shutil.copytree(studied / "calibration", folder / "calibration")
    return folder


def test_an_interrupted_study_continues(
    calibrated: Path, studied: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    judged: list[str] = []
    original = pgsvd_vllm.cli.study.perplexity_of

    def stopped(folder: Path, plan: Any, windows: torch.Tensor, label: str) -> float:
        judged.append(label)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return original(folder, plan, windows, label)

    monkeypatch.setattr(pgsvd_vllm.cli.study, "perplexity_of", stopped)
    questions = ("--questions", "front", "ablation", "time")
    assert run(tiny_model, calibrated, *questions) == 130
    assert json.loads((calibrated / "study.json").read_text())["finished"] == ["front"]
    assert run(tiny_model, calibrated, *questions) == 0
    assert len(judged) == len(set(judged)) + 1 == 7  # the interrupted model alone is measured again
    assert values_of(calibrated, "ablation", "ALS") == pytest.approx(values_of(studied, "ablation", "ALS"), rel=1e-5)
    assert rows_of(calibrated, "front") == rows_of(studied, "front")
    resumed = values_of(calibrated, "time", "resumed")
    assert {"calibration", "gradients"} <= set(resumed)
    assert resumed["calibration"] is resumed["gradients"] is None
    assert "resumed: all of it was found finished" in {
        row["case"].partition(", ")[2].rpartition(", ")[0] for row in rows_of(calibrated, "time")
    }


def test_a_solver_that_is_off_misses_its_bar(
    calibrated: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    def worse(*arguments: Any, **options: Any) -> Factors:
        found = als(*arguments, **options)
        return replace(found, v=0.98 * found.v)

    monkeypatch.setattr(solver, "als", worse)
    assert run(tiny_model, calibrated, "--questions", "solver") == 1
    printed = capsys.readouterr().out
    assert "MISSED  solver: ALS, excess error at its own stop, worst is" in printed
    assert [row["ok"] for row in rows_of(calibrated, "solver") if "bar" in row] == [False, False, True]
    assert "MISSED" in (calibrated / "study.html").read_text()
    # The page of the same folder still says so.
    assert run(tiny_model, calibrated, "--questions", "solver") == 1


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (("--ratio", "1.5"), "--ratio 1.5"),
        (("--num-samples", "1"), "--num-samples 1"),
        (("--seed", "3"), "made with another --seed"),
        (("--ratio", "0.3"), "made with another --ratio"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_named(
    options: tuple[str, ...], culprit: str, studied: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model, studied, *options) == 2
    assert culprit in capsys.readouterr().err


def test_an_unknown_question_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tiny_model, tmp_path / "out", "--questions", "nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_share_that_no_ranks_remove_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    assert run(tiny_model, tmp_path / "out", "--ratio", "0.999", "--questions", "solver") == 2
    assert "--ratio 0.999: more than this model can give" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "GPT-2", "Phi-3, Phi-4", "LLaVA 1.5"])
def test_other_architectures(name: str, tmp_path: Path, one_thread: None) -> None:
    """An MoE model without its experts, transposed weights, fused projections, and a language tower."""
    rows = {row.name: row for row in VISION_MODELS}
    if name in rows:
        model = save_vision_model(rows[name], tmp_path / "model")
    else:
        (row,) = (row for row in ARCHITECTURES if row.name == name)
        model = save_model(row, tmp_path / "model")
    assert run(model, tmp_path / "out") == 0
    assert {row["question"] for q in QUESTIONS for row in rows_of(tmp_path / "out", q)} == set(QUESTIONS)
    assert min(values_of(tmp_path / "out", "front", "squared errors").values()) >= 1
    shared = {row["case"] for row in rows_of(tmp_path / "out", "sharing")}
    assert (shared == {"no two projections share an input"}) == (name in ("GPT-2", "Phi-3, Phi-4"))


def test_a_model_that_predicts_no_text_gets_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (row for row in VISION_MODELS if row.name == "CLIP")
    model = save_vision_model(row, tmp_path / "model")
    capsys.readouterr()
    assert run(model, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "compares images with texts and needs both" in line
