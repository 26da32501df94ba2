"""vLLM's engine features on a factored model, compared with the plain engine's or the dense model's tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.checkpoints import reconstruct_dense
from tests.e2e.engine import CLASSIFY, EMBED, NEW_TOKENS, beam, greedy, one_core_each, run_engine, tokens, try_engine
from tests.features import DOCUMENT, marked


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (8, 40), generator=generator).tolist()


@pytest.fixture(scope="module")
def plain(tiny_compressed: Path, prompts: list[list[int]]) -> list[list[int]]:
    return tokens(run_engine(tiny_compressed, [(prompts, greedy())])[0])


@pytest.fixture(scope="module")
def dense(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return tokens(run_engine(tiny_model, [(prompts, greedy())], load_format="auto")[0])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            # The second job hits the prefix cache, and prefill runs in chunks of 16 tokens.
            {"enable_prefix_caching": True, "max_num_batched_tokens": 16, "max_num_seqs": 8},
            id="prefix caching",
            marks=pytest.mark.feature("prefix caching, chunked prefill"),
        ),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
            id="n-gram speculation",
            marks=pytest.mark.feature("speculative decoding: n-gram (prompt lookup)"),
        ),
        pytest.param(
            {"quantization": "pgsvd"},
            id="quantization given",
            marks=pytest.mark.feature("--quantization pgsvd beside config.json"),
        ),
    ],
)
def test_engine_options_keep_greedy_tokens(
    options: dict[str, Any], tiny_compressed: Path, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    answers = run_engine(tiny_compressed, [(prompts, greedy()), (prompts, greedy())], **options)
    assert [tokens(answer) for answer in answers] == [plain, plain]


@pytest.mark.feature("speculative decoding: compressed draft, dense target")
def test_compressed_draft_keeps_the_dense_target_tokens(
    tiny_model: Path, tiny_compressed: Path, prompts: list[list[int]], dense: list[list[int]]
) -> None:
    config = {"model": str(tiny_compressed), "num_speculative_tokens": 3}
    answers = run_engine(tiny_model, [(prompts, greedy())], load_format="auto", speculative_config=config)
    assert tokens(answers[0]) == dense


@pytest.mark.feature("speculative decoding: factored target and draft")
def test_compressed_target_and_draft_keep_greedy_tokens(
    tiny_compressed: Path, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    config = {"model": str(tiny_compressed), "num_speculative_tokens": 3}
    assert tokens(run_engine(tiny_compressed, [(prompts, greedy())], speculative_config=config)[0]) == plain


@pytest.mark.feature("beam search")
def test_beams_match_the_reconstructed_model(
    tiny_compressed: Path, prompts: list[list[int]], plain: list[list[int]], tmp_path: Path
) -> None:
    dense = reconstruct_dense(tiny_compressed, tmp_path / "dense")
    job = (prompts[:3], beam(4, 12))
    (expected,) = run_engine(dense, [job], load_format="auto", max_logprobs=8)
    (found,) = run_engine(tiny_compressed, [job], max_logprobs=8)
    assert tokens(found) == tokens(expected)
    assert tokens(found) != [row[:12] for row in plain[:3]], "beam search finds nothing but the greedy tokens"


@pytest.mark.feature("classification (--runner pooling --convert classify)")
def test_classification_matches_transformers(tiny_compressed: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """The compressed model with a random classification head of three classes."""
    from transformers import AutoModelForSequenceClassification

    import pgsvd_vllm.hf  # noqa: F401  (registers the format)

    folder = Path(shutil.copytree(tiny_compressed, tmp_path / "classifier"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {str(i): f"class {i}" for i in range(3)},
        "label2id": {f"class {i}": i for i in range(3)},
        "pad_token_id": 1,
    }
    config["quantization_config"]["tensors"] += 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path,) = folder.glob("*.safetensors")
    torch.manual_seed(0)
    save_file(load_file(path) | {"score.weight": 0.1 * torch.randn(3, 128)}, path, metadata={"format": "pt"})
    (index,) = folder.glob("*.index.json")
    known = json.loads(index.read_text(encoding="utf-8"))
    known["weight_map"]["score.weight"] = path.name
    index.write_text(json.dumps(known), encoding="utf-8")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.softmax(-1)
    (answers,) = run_engine(folder, [(prompts, CLASSIFY)], runner="pooling")
    torch.testing.assert_close(torch.tensor([answer.vector for answer in answers]), expected, atol=2e-5, rtol=0)
    assert expected.std(0).min() > 1e-2


@pytest.mark.feature("sleep mode: refused by vLLM on CPU, with its message")
def test_sleep_mode_is_refused_by_vllm_on_cpu(tiny_compressed: Path) -> None:
    done = try_engine(tiny_compressed, [], enable_sleep_mode=True)
    assert done.returncode != 0
    assert "Sleep mode is not supported on current platform" in done.log


@pytest.mark.slow
@pytest.mark.feature("pipeline parallelism, 2 stages")
def test_two_pipeline_stages_keep_greedy_tokens(
    tiny_compressed: Path, prompts: list[list[int]], plain: list[list[int]], tmp_path: Path
) -> None:
    answers = run_engine(
        tiny_compressed,
        [(prompts, greedy())],
        pipeline_parallel_size=2,
        # vLLM 0.32 on CPU starts no second stage without the warm-up of compilation, nor for dense models.
        enforce_eager=False,
        environment={**one_core_each(), "VLLM_CACHE_ROOT": str(tmp_path)},
    )
    assert tokens(answers[0]) == plain
    assert {len(answer) for answer in plain} == {NEW_TOKENS}


@pytest.mark.feature("--load-format dummy")
def test_engine_starts_with_dummy_weights(tiny_compressed: Path, prompts: list[list[int]]) -> None:
    """Dummy weights try out sizes before a checkpoint exists."""
    answers = run_engine(tiny_compressed, [(prompts, greedy())], load_format="dummy")
    assert {len(answer) for answer in tokens(answers[0])} == {NEW_TOKENS}


@pytest.mark.feature("weights reloaded into a running engine")
def test_weights_reload_into_a_running_engine(
    tiny_compressed: Path, prompts: list[list[int]], plain: list[list[int]], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_compressed, tmp_path / "other"))
    (path,) = other.glob("*.safetensors")
    torch.manual_seed(0)
    weights = {
        name: tensor * (1 + 0.3 * torch.randn(())) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    expected = tokens(run_engine(other, [(prompts, greedy())])[0])
    assert expected != plain
    answers = run_engine(tiny_compressed, [(prompts, greedy())], reload=other)
    assert [tokens(answer) for answer in answers] == [plain, expected]


@pytest.mark.feature("embeddings (--runner pooling)")
def test_embeddings_match_transformers(tiny_compressed: Path, prompts: list[list[int]]) -> None:
    from transformers import AutoModel

    import pgsvd_vllm.hf  # noqa: F401  (registers the format)

    with torch.no_grad():
        model = AutoModel.from_pretrained(tiny_compressed, dtype=torch.float32).eval()
        last = model(torch.tensor(prompts)).last_hidden_state[:, -1]
    (answers,) = run_engine(tiny_compressed, [(prompts, EMBED)], runner="pooling", convert="embed")
    found = torch.tensor([answer.vector for answer in answers])
    torch.testing.assert_close(found, torch.nn.functional.normalize(last, dim=-1), atol=2e-5, rtol=0)


def test_vllm_features_md_names_every_test() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    found = {tuple(cell.strip(" `") for cell in row.strip("|").split("|")) for row in rows}
    assert found == {(feature, name.partition("/")[2], "passed") for name, feature in marked().items()}, (
        "run: python tests/features.py"
    )
