"""Text that a model samples from itself: right draws, right form, cached, resumed, bounded."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.sampled import self_text
from pgsvd_vllm.offline.data.sampled.decode import ATTENTION
from pgsvd_vllm.offline.data.sampled.generate import generate
from pgsvd_vllm.offline.data.sampled.scripts import (
    LONGEST_DOCUMENT,
    LONGEST_USER,
    Chat,
    Form,
    FreeText,
    Turns,
    read_form,
)
from pgsvd_vllm.offline.data.sampled.self_text import Machine, SelfText, piece_length
from pgsvd_vllm.offline.data.text import load_tokenizer
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import HELD_OUT, CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from tests.conftest import run_cli, save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, Architecture, save_model

TEMPLATE = (
    "{{ '<s>' }}system: be kind</s>"
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CPU = torch.device("cpu")
LENGTH = 96
COMMON = ("--num-calibration-samples", "8", "--max-seq-length", "64", "--sensitivity", "uniform")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model with a chat template, and a cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def text_of(folder: Path, *, seed: int = 0, length: int = LENGTH, free: int | None = None) -> SelfText:
    return SelfText(ModelSource(folder), load_tokenizer(folder), Machine(CPU, torch.float32, free), length, seed)


@torch.no_grad()
def redrawn(dense: Any, text: SelfText, ids: torch.Tensor, row: int) -> tuple[list[int], int]:
    """A window drawn anew from predictions of the whole window at once, and the number of draws that it used."""
    shares = dense(ids[row : row + 1], use_cache=False).logits[0].double().softmax(-1)
    script = text._script(row)
    found, used = [script.next(-1)], 0
    for position in range(ids.shape[1] - 1):
        uniform = script.chance.random()
        drawn = int((shares[position].cumsum(0) <= uniform).sum())
        found.append(script.next(drawn))
        used += found[-1] == drawn
    return found, used


def test_tokens_are_draws_from_the_models_own_predictions(model: Path) -> None:
    text = text_of(model)
    ids = text.sample(6)
    assert ids.shape == (6, LENGTH)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    for row in range(6):
        found, used = redrawn(dense, text, ids, row)
        assert found == ids[row].tolist()
        assert used > LENGTH // 2


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=[row.name for row in ARCHITECTURES])
def test_every_kind_of_kv_cache_and_state(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_model(architecture, tmp_path / "model")
    text = text_of(folder, length=24)
    ids = text.sample(2)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row in range(2):
        assert redrawn(dense, text, ids, row)[0] == ids[row].tolist()


def test_a_long_window_consists_of_pieces_that_are_sampled_on_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "PIECE", LENGTH // 3)
    monkeypatch.setattr(self_text, "ROWS", 4)  # one window at a time, and not four thirds
    text = text_of(model)
    ids = text.sample(2)
    assert ids.shape == (2, LENGTH)
    pieces = ids.view(6, LENGTH // 3)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    for piece in range(6):
        assert redrawn(dense, text, pieces, piece)[0] == pieces[piece].tolist()
    assert text_of(model).cached(2).equal(ids)


@pytest.mark.parametrize(
    ("length", "piece"),
    [(8, 8), (512, 512), (513, 513), (1000, 500), (1021, 1021), (1023, 341), (1024, 512), (4096, 512)],
)
def test_pieces_divide_a_window(length: int, piece: int) -> None:
    assert piece_length(length) == piece


def test_distillation_gets_windows_of_its_own(model: Path, tmp_path: Path) -> None:
    options = CompressOptions(
        str(model), tmp_path / "out", refine=2.5, num_calibration_samples=8, max_seq_length=64, device="cpu"
    )
    windows = make_plan(options).with_text().data.windows
    assert len(windows.ids) == 8
    assert len(windows.others) == HELD_OUT + 13
    every = torch.cat([windows.ids, windows.others])
    assert len(every.unique(dim=0)) == len(every)


def test_windows_do_not_depend_on_the_batch_they_are_in(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = text_of(model).sample(5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "other"))
    monkeypatch.setattr(self_text, "ROWS", 2)
    assert text_of(model).sample(5).equal(together)
    assert not text_of(model, seed=1).sample(5).equal(together)


def test_half_of_the_windows_are_conversations_in_the_template(model: Path) -> None:
    text = text_of(model, length=200)
    tokenizer: Any = load_tokenizer(model)
    turns = text.form.turns
    assert turns is not None
    assert tokenizer.decode(turns.opening) == "<s>system: be kind</s><s>user: "
    assert tokenizer.decode(turns.to_assistant) == "</s><s>assistant: "
    assert tokenizer.decode(turns.to_user) == "</s><s>user: "
    windows = [tokenizer.decode(row) for row in text.sample(6)]
    for window in windows[1::2]:
        assert window.startswith("<s>system: be kind</s><s>user: ")
        assert all(part.startswith(("user: ", "assistant: ", "system: be kind<")) for part in window.split("<s>")[1:-1])
    assert not any("system:" in window for window in windows[::2])


def test_a_long_message_ends_and_an_answer_is_followed_by_a_user() -> None:
    form = Form([], [1], frozenset({1}), [5], Turns([2], [1, 3], [1, 4]))
    chat = Chat(form, random.Random(0))
    tokens = [chat.next(9) for _ in range(LONGEST_USER + 4)]
    assert tokens[: LONGEST_USER + 3] == [2, *[9] * LONGEST_USER, 1, 3]
    ended = [chat.next(token) for token in (1, 0)]
    assert ended in ([1, 4], [1, 2])


def test_a_document_ends_at_a_special_token_and_another_begins() -> None:
    text = FreeText(Form([7], [1], frozenset({1, 7}), [5], None), random.Random(0))
    assert [text.next(token) for token in (-1, -1, 9, 7, 0, 0, 8)] == [7, 5, 9, 1, 7, 5, 8]
    rest = [text.next(9) for _ in range(LONGEST_DOCUMENT + 2)]
    assert rest == [*[9] * (LONGEST_DOCUMENT - 1), 1, 7, 5]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"])
def test_without_usable_turns_all_windows_are_free_text(model: Path, template: str | None) -> None:
    (model / "chat_template.jinja").unlink()
    if template is not None:
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert read_form(load_tokenizer(model), []).turns is None
    assert isinstance(text_of(model)._script(1), FreeText)


def test_an_interrupted_run_continues_and_a_damaged_file_is_sampled_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_of(model).sample(6)
    text = text_of(model)
    monkeypatch.setattr(self_text, "generate", None)  # nothing is sampled that is known
    assert text.sample(6).equal(whole)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "second"))
    monkeypatch.setattr(self_text, "ROWS", 2)
    calls = 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(self_text, "generate", interrupted)
    text = text_of(model)
    with pytest.raises(KeyboardInterrupt):
        text.sample(6)
    assert len(text.cached(6)) == 4
    damaged = text.folder / "000002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert len(text.cached(6)) == 2
    assert not damaged.exists()
    assert text.sample(6).equal(whole)


def test_attention_of_one_query_matches_float64() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=24, initializer_range=0.5,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (3, 20))
    outputs = []
    for name, dtype in (("eager", torch.float64), (ATTENTION, torch.float32)):
        dense.to(dtype).set_attn_implementation(name)
        state = dense(ids[:, :-1], use_cache=True).past_key_values
        outputs.append(dense(ids[:, -1:], past_key_values=state).logits.double())
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 * outputs[0].abs().max()


def patched(patch: str, model: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compress in a process in which `self_text` was changed."""
    code = (
        f"import sys; from pgsvd_vllm.offline.data.sampled import self_text; {patch}; "
        "from pgsvd_vllm.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "compress", str(model), "-o", str(output), *COMMON, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_large_model_on_a_cpu_gets_python_docs_for_the_rest(model: Path, tmp_path: Path) -> None:
    done = patched("self_text.CPU_FLOPS = 3 * 64 * 2 * 7e5", model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "windows of 64 tokens from the model itself (self, sampled in about" in done.stdout
    assert " + python-docs" in done.stdout
    assert "of 8 windows in reasonable time; python-docs gives the others" in done.stdout


def test_python_docs_takes_the_place_of_a_default_that_fails(model: Path, tmp_path: Path) -> None:
    failure = "self_text.generate = lambda *_: 1 / 0"
    done = patched(failure, model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("WARNING"))
    assert "cannot generate text in transformers (division by zero)" in line
    assert line.endswith("python-docs takes its place")
    assert '"name": "python-docs"' in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    refused = patched(failure, model, tmp_path / "other", "--dataset", "self")
    assert refused.returncode == 2
    assert "--dataset self: " in refused.stderr
    assert "give a text" in refused.stderr


def test_an_interruption_says_that_the_text_is_kept(model: Path, tmp_path: Path) -> None:
    # Not SIGINT, which a background shell ignores.
    stop = "import os, time; self_text.generate = lambda *_: (os.kill(os.getpid(), 15), time.sleep(60))"
    done = patched(stop, model, tmp_path / "out")
    assert done.returncode == 128 + 15
    assert done.stderr.splitlines()[-1].endswith("text that is sampled already is kept, repeat the command")


def test_the_default_is_the_models_own_text(model: Path, tmp_path: Path) -> None:
    planned = run_cli("compress", model, "-o", tmp_path / "out", "--dry-run", *COMMON)
    assert planned.returncode == 0, planned.stderr
    assert "8 windows of 64 tokens from the model itself (self, sampled in about" in planned.stdout
    assert not (tmp_path / "cache").exists()
    done = run_cli("compress", model, "-o", tmp_path / "out", *COMMON)
    assert done.returncode == 0, done.stderr
    assert '"name": "self"' in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    again = run_cli("compress", model, "-o", tmp_path / "again", *COMMON)
    assert "from the model itself (self), on cpu" in again.stdout
    assert "sample:" not in again.stderr
    weights = [[path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")] for name in ("out", "again")]
    assert weights[0] == weights[1] != []
    mixed = run_cli(
        *("compress", model, "-o", tmp_path / "mixed", "--dataset", "python-docs", "--dataset", "self", *COMMON)
    )
    assert "8 windows of 64 tokens from python-docs + the model itself (self), on cpu" in mixed.stdout


def test_a_run_that_cannot_begin_samples_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text("{}", encoding="utf-8")
    done = run_cli("compress", model, "-o", tmp_path / "out", *COMMON)
    assert "left by an interrupted run" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_memory_decides_whether_a_model_can_sample(model: Path, tmp_path: Path) -> None:
    few = ModelSource(model).weights.numel * 4
    assert text_of(model, free=2 * few)._rows > 0
    text = text_of(model, free=few)
    assert text._rows == 0
    with pytest.raises(InputError, match="does not fit into memory as a whole"):
        text.sample(2)
    blocked = tmp_path / "cache"  # a file in the place of the folder
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to another folder"):
        text_of(model).sample(2)
