"""`pgsvd-vllm evaluate`: perplexity, scores and answers of real models, against float64."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.evaluation import models, tasks
from pgsvd_vllm.evaluation.perplexity import held_out_prose, spread_windows
from pgsvd_vllm.evaluation.recovery import compared
from pgsvd_vllm.evaluation.tasks import Job, score
from pgsvd_vllm.offline.data.text import load_tokenizer

SMALL = ["--num-samples", "6", "--max-seq-length", "64"]


def evaluated(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions with two or three choices of several letters."""
    draw = random.Random(0)
    words = ["a b", "cd", "efg h", "x", "yes", "no way", "12", "z9"]
    rows = [{"query": f"question {i}:", "choices": draw.sample(words, 2 + i % 2), "gold": i % 2} for i in range(24)]
    file = tmp_path_factory.mktemp("questions") / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@torch.no_grad()
def reference_losses(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    windows = spread_windows(load_tokenizer(folder), [held_out_prose()], 6, 64)
    logs = model(windows).logits[:, :-1].log_softmax(-1)
    return -logs.gather(2, windows[:, 1:, None]).mean((1, 2))


@torch.no_grad()
def reference_scores(folder: Path, questions: Path) -> list[float]:
    """Whether each question's right choice has the largest log-probability, in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), load_tokenizer(folder)
    found = []
    for row in map(json.loads, questions.read_text().splitlines()):
        logs = []
        for choice in row["choices"]:
            start, whole = (tokenizer(t)["input_ids"] for t in (row["query"], f"{row['query']} {choice}"))
            steps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            logs.append(sum(steps[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        found.append(float(max(range(len(logs)), key=logs.__getitem__) == row["gold"]))
    return found


def test_perplexity_is_that_of_float64(
    tiny_model: Path, tiny_compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    assert evaluated(tiny_compressed, "--against", tiny_model, *SMALL, "--prompt", "Hello", "--json", found) == 0
    report = json.loads(found.read_text())
    assert (report["model"], report["against"]) == (tiny_compressed.name, tiny_model.name)  # it may be published
    (row,) = report["rows"]
    assert row["value"] == pytest.approx(reference_losses(tiny_compressed).mean().exp().item(), rel=1e-4)
    assert row["base"] == pytest.approx(reference_losses(tiny_model).mean().exp().item(), rel=1e-4)
    assert row["recovery"] == pytest.approx(row["base"] / row["value"])
    assert row["low"] <= row["recovery"] <= row["high"]
    assert row["ok"]
    (answer,) = report["answers"]
    assert answer["prompt"] == "Hello"
    printed = capsys.readouterr().out
    assert "docstrings (6 x 64 tokens), perplexity" in printed
    assert "> Hello" in printed
    for name, folder in (("compressed", tiny_compressed), ("base", tiny_model)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
        ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
        assert answer[name] == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_the_field_of_the_text_is_named(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, field in (("a.jsonl", "body"), ("b.jsonl", "text")):
        rows = [json.dumps({field: f"Sentence {i} of a text.", "id": i}) for i in range(400)]
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    small = ["--num-samples", "2", "--max-seq-length", "32", "--no-answers", "--json", tmp_path / "found.json"]
    values = []
    for given in ([tmp_path / "a.jsonl", "--text-column", "body"], [tmp_path / "b.jsonl"]):
        assert evaluated(tiny_model, "--dataset", *given, *small) == 0
        values.append(json.loads((tmp_path / "found.json").read_text())["rows"][0]["value"])
    assert values[0] == values[1]
    assert evaluated(tiny_model, "--dataset", tmp_path / "a.jsonl", *small) == 2
    assert "or the field that --text-column names" in capsys.readouterr().err


def test_too_little_kept_is_status_3(
    tiny_model: Path, tiny_compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [tiny_compressed, "--against", tiny_model, *SMALL, "--no-answers", "--min-recovery"]
    assert evaluated(*given, "0.01") == 0
    assert "required" not in capsys.readouterr().out
    assert evaluated(*given, "50") == 3
    assert "5000.0% required" in capsys.readouterr().out


def test_values_that_are_not_finite_fail(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert evaluated(broken, *SMALL, "--no-answers", "--json", tmp_path / "found.json") == 3
    assert "not a finite number" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["value"] is None
    assert not row["ok"]


def test_scores_are_those_of_float64(
    tiny_model: Path, tiny_compressed: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    given = ["--num-samples", "0", "--no-answers", "--tasks", questions, "--backend", "hf"]
    assert evaluated(tiny_compressed, "--against", tiny_model, *given, "--json", tmp_path / "found.json") == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    mine, base = (reference_scores(folder, questions) for folder in (tiny_compressed, tiny_model))
    assert (row["name"], row["unit"], row["count"]) == ("quiz", "acc", 24)
    assert (row["value"], row["base"]) == (pytest.approx(sum(mine) / 24), pytest.approx(sum(base) / 24))
    assert "quiz, acc" in capsys.readouterr().out


@pytest.mark.slow
def test_vllm_scores_as_transformers(tiny_compressed: Path, questions: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    pytest.importorskip("vllm", reason="vLLM is not installed")
    name, found = score(Job(str(tiny_compressed), [str(questions)], "vllm", model_args="max_model_len=256"))["quiz"]
    assert name == "acc"
    # Choices whose log-probabilities differ by less than rounding may fall either way.
    assert sum(a != b for a, b in zip(found.tolist(), reference_scores(tiny_compressed, questions), strict=True)) <= 1


def test_the_interval_is_that_of_paired_samples() -> None:
    """Losses that differ by the same amount everywhere leave no doubt, however much the texts differ."""
    torch.manual_seed(0)
    base = 3 + torch.randn(40, dtype=torch.float64)
    same = compared("text", "perplexity", base + 0.1, base)
    assert [same.low, same.recovery, same.high] == pytest.approx([math.exp(-0.1)] * 3)
    unlike = compared("text", "perplexity", base + 0.1 + 0.5 * torch.randn(40, dtype=torch.float64), base)
    assert unlike.recovery is not None
    assert unlike.low is not None
    assert unlike.high is not None
    # 1.96 standard errors of the mean difference on either side.
    assert math.log(unlike.high / unlike.low) == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.35)
    scores = compared("task", "acc", torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 1, 1, 0]).double())
    assert (scores.value, scores.base, scores.recovery) == (1.0, 0.75, pytest.approx(4 / 3))


def test_windows_are_no_longer_than_the_model_reaches(tiny_model: Path, tmp_path: Path) -> None:
    given = ["--num-samples", "2", "--max-seq-length", "4096", "--no-answers", "--json", tmp_path / "found.json"]
    assert evaluated(tiny_model, *given) == 0
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["name"] == "docstrings (2 x 512 tokens)"


def test_float32_buffers_stay_as_they_are(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "gemm_dtype", lambda _device, dtype: dtype)
    model = models.load_model(smollm2, torch.device("cpu"), trust_remote_code=False)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tasks_are_checked_before_any_model_is_loaded(
    tiny_model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    again = tmp_path / questions.name
    shutil.copy(questions, again)
    for given, culprit in (
        (["/nonexistent.jsonl"], "/nonexistent.jsonl: no such file"),
        (["no_such_task"], "lm_eval knows no such task"),
        ([questions, again], "another file has the same name"),
    ):
        assert evaluated(tiny_model, "--tasks", *given) == 2
        assert culprit in capsys.readouterr().err


def test_a_sample_counts_once_however_many_filters_a_task_has(
    tiny_model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    filters = "".join(f"  - name: {name}\n    filter:\n      - function: take_first\n" for name in ("one", "two"))
    monkeypatch.setattr(tasks, "DEFINITION", f"{tasks.DEFINITION}filter_list:\n{filters}")
    found = tasks._run(Job(str(tiny_model), [str(questions)], "hf"))
    assert len(found["quiz"][1]) == 24


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--num-samples", "1"], "--num-samples 1"),
        (["--max-seq-length", "4"], "--max-seq-length 4"),
        (["--limit", "0"], "--limit 0"),
        (["--min-recovery", "0.9"], "--against"),
        (["--min-recovery", "0", "--against", "X"], "--min-recovery 0"),
        (["--json", "/nonexistent/rows.json"], "--json /nonexistent/rows.json"),
        (["--dataset", "/nonexistent.txt", "--no-answers"], "/nonexistent.txt: no such file"),
        (["--num-samples", "100000", "--max-seq-length", "512"], "windows of 512 tokens, 100000 are needed"),
        (["--json", "/"], "--json /"),
        (["--against", "/nonexistent"], "--against /nonexistent: no such folder"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_error(
    tiny_model: Path, arguments: list[Any], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(tiny_model, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pgsvd-vllm: error: ")
    assert culprit in error
