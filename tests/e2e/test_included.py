"""Projections that --include adds, on real engines: MoE experts and the LM head; on one rank, on two, compiled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.format.reader import open_checkpoint
from tests.conftest import save_tiny_model
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.e2e.checkpoints import transformers_greedy
from tests.e2e.engine import greedy, one_core_each, run_engine, tokens

NEW_TOKENS = 24
FEW = ("--num-calibration-samples", "64", "--max-seq-length", "64")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (8, 9), generator=generator).tolist()


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose experts have different ranks; some of them stay dense."""
    folder = tmp_path_factory.mktemp("moe")
    row = next(row for row in ARCHITECTURES if row.name == "Mixtral")
    command = ["compress", str(save_model(row, folder / "model")), "-o", str(folder / "out"), "--ratio", "0.3"]
    assert main([*command, "--include", "experts", *FEW]) == 0
    assert main(["verify", str(folder / "out")]) == 0
    modules = open_checkpoint(folder / "out").modules
    ranks = {module.rank for name, module in modules.items() if ".experts." in name}
    assert len(ranks) > 3
    return folder / "out"


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose LM head is factored as well."""
    folder = tmp_path_factory.mktemp("head")
    model = save_tiny_model(folder / "model", tie=False)
    command = ["compress", str(model), "-o", str(folder / "out"), "--ratio", "0.3"]
    assert main([*command, "--include", "lm_head", "--head-tolerance", "0.3", *FEW]) == 0
    assert main(["verify", str(folder / "out")]) == 0
    assert open_checkpoint(folder / "out").modules["lm_head"].form == "factors"
    return folder / "out"


@pytest.mark.feature("Factored MoE experts")
def test_factored_experts_match_transformers(moe_model: Path, prompts: list[list[int]]) -> None:
    found = tokens(run_engine(moe_model, [(prompts, greedy(NEW_TOKENS))])[0])
    assert found == transformers_greedy(moe_model, prompts, NEW_TOKENS)
    assert len({token for answer in found for token in answer}) > 7


@pytest.mark.slow
@pytest.mark.feature("Factored MoE experts, compiled")
def test_compiled_factored_experts_match_transformers(moe_model: Path, prompts: list[list[int]]) -> None:
    found = tokens(run_engine(moe_model, [(prompts, greedy(NEW_TOKENS))], enforce_eager=False)[0])
    assert found == transformers_greedy(moe_model, prompts, NEW_TOKENS)


@pytest.mark.feature("Factored MoE experts, tensor parallelism")
def test_factored_experts_on_two_ranks(moe_model: Path, prompts: list[list[int]]) -> None:
    done = run_engine(moe_model, [(prompts, greedy(NEW_TOKENS))], tensor_parallel_size=2, environment=one_core_each())
    assert tokens(done[0]) == transformers_greedy(moe_model, prompts, NEW_TOKENS)


@pytest.mark.feature("Factored LM head")
def test_factored_lm_head_matches_transformers(with_head: Path, prompts: list[list[int]]) -> None:
    found = tokens(run_engine(with_head, [(prompts, greedy(NEW_TOKENS))])[0])
    assert found == transformers_greedy(with_head, prompts, NEW_TOKENS)
    assert len({token for answer in found for token in answer}) > 7


@pytest.mark.feature("Factored LM head, LoRA enabled")
def test_factored_lm_head_with_lora_enabled(with_head: Path, prompts: list[list[int]]) -> None:
    found = tokens(run_engine(with_head, [(prompts, greedy(NEW_TOKENS))], enable_lora=True, max_loras=1)[0])
    assert found == transformers_greedy(with_head, prompts, NEW_TOKENS)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        # vLLM runs it with transformers' code, whose rules take every `weight_v` for one of weight normalisation.
        ("GPT-NeoX, Pythia", "embed_out"),
        # vLLM makes its head without asking for a method.
        ("OPT", "lm_head"),
    ],
)
def test_lm_heads_of_other_architectures_are_served(
    name: str, head: str, tmp_path: Path, prompts: list[list[int]], one_thread: None
) -> None:
    row = next(row for row in ARCHITECTURES if row.name == name)
    row = replace(row, options=row.options | {"tie_word_embeddings": False})
    command = ["compress", str(save_model(row, tmp_path / "model")), "-o", str(tmp_path / "out"), *FEW]
    options = ("--ratio", "0.3", "--form", "factors", "--include", "lm_head", "--head-tolerance", "0.3")
    assert main([*command, *options]) == 0
    assert head in open_checkpoint(tmp_path / "out").modules
    found = tokens(run_engine(tmp_path / "out", [(prompts, greedy(NEW_TOKENS))])[0])
    assert found == transformers_greedy(tmp_path / "out", prompts, NEW_TOKENS)


@pytest.mark.feature("Factored LM head, tensor parallelism")
def test_factored_lm_head_on_two_ranks(with_head: Path, prompts: list[list[int]]) -> None:
    done = run_engine(with_head, [(prompts, greedy(NEW_TOKENS))], tensor_parallel_size=2, environment=one_core_each())
    assert tokens(done[0]) == transformers_greedy(with_head, prompts, NEW_TOKENS)


def test_factored_moe_model_can_be_saved_again(moe_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe_model, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "again")
    before, after = open_checkpoint(moe_model), open_checkpoint(tmp_path / "again")
    assert after.modules == before.modules
    assert after.tensors.keys() == before.tensors.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("options", [("--sensitivity", "forward"), ("--tolerance", "0.4"), ("--ratio", "language=0.3")])
def test_experts_with_other_rank_options(options: tuple[str, ...], tmp_path: Path, one_thread: None) -> None:
    row = next(row for row in ARCHITECTURES if row.name == "Qwen3-MoE")
    command = ["compress", str(save_model(row, tmp_path / "model")), "-o", str(tmp_path / "out"), *FEW]
    assert main([*command, "--include", "experts", *options]) == 0
    assert any(".experts." in name for name in open_checkpoint(tmp_path / "out").modules)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_lm_head_joins_a_finished_calibration(tmp_path: Path, one_thread: None) -> None:
    model = save_tiny_model(tmp_path / "model", tie=False)
    command = ["compress", str(model), "--ratio", "0.3", "--calibration", str(tmp_path / "kept"), *FEW]
    assert main([*command, "-o", str(tmp_path / "without")]) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.safetensors")}
    assert len(files) == 6
    assert main([*command, "-o", str(tmp_path / "with"), "--include", "lm_head", "--head-tolerance", "0.3"]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in files.items())
    without, with_head = (open_checkpoint(tmp_path / name).modules for name in ("without", "with"))
    assert with_head.keys() == {*without, "lm_head"}


def test_experts_with_too_few_tokens_stay_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    row = next(row for row in ARCHITECTURES if row.name == "Qwen2-MoE")
    few = ("--num-calibration-samples", "8", "--max-seq-length", "32")
    command = ["compress", str(save_model(row, tmp_path / "model")), "-o", str(tmp_path / "out"), *few]
    assert main([*command, "--include", "experts", "--ratio", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "tokens per MoE expert: " in said
    assert "WARNING: an MoE expert sees about" not in said
    assert "projections of MoE experts stay dense, since too few tokens reach them" in said
    report = json.loads((tmp_path / "out" / "pgsvd_report.json").read_text(encoding="utf-8"))
    reached = report["tokens"]
    assert len(reached) == 3 * 4 * 3  # layers, experts, projections of each
    # Every token chooses two experts.
    first = {name: n for name, n in reached.items() if ".layers.0." in name and name.endswith("up_proj")}
    assert sum(first.values()) == 2 * 8 * 32
    modules = open_checkpoint(tmp_path / "out").modules
    sizes = {"gate_proj": 128, "up_proj": 128, "down_proj": 64}
    starved = {name for name, n in reached.items() if n < sizes[name.rpartition(".")[2]]}
    assert starved
    assert not starved & modules.keys()
    assert {name for name in modules if ".experts." in name} <= reached.keys() - starved
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("model", "include", "told"),
    [
        ("Llama 2, 3", "experts", "has no MoE whose checkpoint stores expert by expert"),
        ("Gemma 2", "lm_head", "ties its LM head to the input embeddings"),
    ],
)
def test_include_without_a_match_is_refused(
    model: str, include: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in ARCHITECTURES if row.name == model)
    command = ["compress", str(save_model(row, tmp_path / "model")), "-o", str(tmp_path / "out")]
    assert main([*command, "--include", include, *FEW]) != 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
