"""Every vision-language architecture: a tiny random model is compressed, verified and served like by transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from pgsvd_vllm.cli import main
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.data.image_text import PROMPT, load_processor
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.source import KINDS, ModelSource
from tests.e2e.checkpoints import reconstruct_dense
from tests.e2e.engine import EMBED, Answer, greedy, one_core_each, run_engine, tokens
from tests.e2e.vision_models import VISION_MODELS, VisionModel, save_pairs, save_vision_model

NEW_TOKENS = 16
ASKED = 6
# Bound on differences of float32 log-probabilities, and of unit embeddings, from another order of sums.
CLOSE = 2e-3
# The same for a bf16 engine and float32 transformers: 0.16 was seen, and 1.7 with two modules in each other's place.
BF16_CLOSE = 0.3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 128)


def rows_of(pairs: Path) -> list[dict[str, str]]:
    lines = (pairs / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:ASKED]]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if row.core else pytest.mark.slow) for row in VISION_MODELS]
)
def test_compressed_model_matches_transformers(row: VisionModel, pairs: Path, tmp_path: Path, one_thread: None) -> None:
    """Compress with chosen ranks, and with every projection factored; vLLM serves the second checkpoint."""
    model = save_vision_model(row, tmp_path / "model")
    for output, options in ((tmp_path / "chosen", ()), (tmp_path / "all", ("--baseline", "pifa"))):
        arguments = ["compress", str(model), "-o", str(output), "--ratio", "0.25", "--dataset", str(pairs), *options]
        assert main(arguments) == 0
        assert main(["verify", str(output)]) == 0
    chosen, served = (open_checkpoint(tmp_path / name).modules for name in ("chosen", "all"))
    towers = {p.name: p.tower for row in find_projections(ModelSource(model)).layers for p in row}
    assert {towers[name] for name in chosen} >= {"vision", "language"}
    assert {towers[name] for name in served} == {"vision", "language"} | ({"projector"} if row.projector else set())
    if row.compares:
        check_embeddings(tmp_path / "all", pairs)
    else:
        check_answers(tmp_path / "all", pairs, row.like_transformers, **row.engine)


@torch.inference_mode()
def check_embeddings(folder: Path, pairs: Path) -> None:
    """Text and image embeddings match transformers."""
    rows = rows_of(pairs)
    texts = [{"prompt": row["text"]} for row in rows]
    images = [{"prompt": "", "image": str(pairs / row["image"])} for row in rows]
    found = run_engine(folder, [(texts, EMBED), (images, EMBED)], runner="pooling", max_model_len=64)
    processor, model = load_processor(folder), KINDS[2][1].from_pretrained(folder, dtype=torch.float32).eval()
    masks = "attention_mask" in processor.tokenizer.model_input_names
    options: dict[str, Any] = {} if masks else {"padding": "max_length"}
    seen = []
    for row, text, image in zip(rows, *found, strict=True):
        opened = Image.open(pairs / row["image"]).convert("RGB")
        expected = model(**processor(text=[row["text"]], images=[opened], return_tensors="pt", **options))
        torch.testing.assert_close(torch.tensor(text.vector), expected.text_embeds[0], atol=CLOSE, rtol=0)
        torch.testing.assert_close(torch.tensor(image.vector), expected.image_embeds[0], atol=CLOSE, rtol=0)
        seen.append(expected.image_embeds[0])
    # A model with one embedding for all images would hide errors.
    assert min(float((a - b).abs().max()) for a in seen for b in seen if a is not b) > 3 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA 1.5", "Qwen2-VL", "Idefics 3, SmolVLM"])
def test_vision_models_on_two_ranks(name: str, pairs: Path, tmp_path: Path, one_thread: None) -> None:
    """vLLM cuts a projector's first layer by outputs and its second by inputs; it replicates Idefics 3's."""
    row = next(row for row in VISION_MODELS if row.name == name)

    def even(ids: dict[str, int]) -> dict[str, Any]:
        options = row.options(ids)
        heads = next(key for key in options["vision_config"] if key in ("num_heads", "num_attention_heads"))
        return options | {"vision_config": options["vision_config"] | {heads: 4}}

    model, output = save_vision_model(replace(row, options=even), tmp_path / "model"), tmp_path / "all"
    arguments = ["compress", str(model), "-o", str(output), "--ratio", "0.25", "--dataset", str(pairs)]
    assert main([*arguments, "--baseline", "pifa"]) == 0
    check_answers(output, pairs, True, tensor_parallel_size=2, environment=one_core_each())


@pytest.mark.slow
def test_unfactored_vllm_layers_get_dense_weights(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """The dense fallback: vLLM builds InternVL's vision attention without factored linear layers."""
    monkeypatch.setattr("pgsvd_vllm.offline.model.find_projections.STAYS_DENSE", {})
    row = next(row for row in VISION_MODELS if row.name == "InternVL 3")
    model, output = save_vision_model(row, tmp_path / "model"), tmp_path / "all"
    arguments = ["compress", str(model), "-o", str(output), "--ratio", "0.25", "--dataset", str(pairs)]
    assert main([*arguments, "--baseline", "pifa"]) == 0
    assert "model.vision_tower.encoder.layer.0.attention.q_proj" in open_checkpoint(output).modules
    # A reload clears the workers' image cache; vLLM's scheduler does not know, so its cache is off.
    check_answers(output, pairs, True, reload=output, mm_processor_cache_gb=0, enable_prefix_caching=False)


def check_answers(folder: Path, pairs: Path, like_transformers: bool, **engine: Any) -> None:
    """Answers about images have the reference's log-probabilities and are its most likely tokens."""
    processor = load_processor(folder)
    prompts = []
    for row in rows_of(pairs):
        text = f"{processor.image_token}\n{PROMPT}"
        if processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        prompts.append({"prompt": text, "image": str(pairs / row["image"])})
    job = (prompts, greedy(NEW_TOKENS, logprobs=0))
    found, *again = run_engine(folder, [job], max_model_len=512, **engine)
    assert all(tokens(answers) == tokens(found) for answers in again)
    assert len({tuple(answer.tokens) for answer in found}) > 1, "the model gives one answer for all images"
    if not like_transformers:
        dense = reconstruct_dense(folder, folder.with_name("back"))
        expected = run_engine(dense, [job], max_model_len=512, load_format="auto")[0]
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(logprobs(one), logprobs(other), atol=CLOSE, rtol=0)
        return
    model = KINDS[1][1].from_pretrained(folder, dtype=torch.float32).eval()
    close = BF16_CLOSE if engine.get("dtype") == "bfloat16" else CLOSE
    for prompt, answer in zip(prompts, found, strict=True):
        opened = Image.open(prompt["image"]).convert("RGB")
        inputs = processor(text=[prompt["prompt"]], images=[opened], return_tensors="pt")
        given, best = forced(model, inputs, answer.tokens)
        torch.testing.assert_close(given, best, atol=close, rtol=0)
        torch.testing.assert_close(logprobs(answer), given, atol=close, rtol=0)


def logprobs(answer: Answer) -> torch.Tensor:
    """Log-probabilities of an answer's tokens, [steps]."""
    assert len(answer.tokens) == NEW_TOKENS
    return torch.tensor([step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)])


@torch.inference_mode()
def forced(model: Any, inputs: Any, answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a given answer in transformers, and the largest ones at each of its steps, [steps]."""
    start = inputs["input_ids"].shape[1]
    model.generation_config.eos_token_id = None  # answers go on past the end token
    outputs = model.generate(
        **inputs,
        max_new_tokens=len(answer),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _batch, ids: [answer[len(ids) - start]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = torch.stack(outputs.logits)[:, 0].log_softmax(-1)
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0], found.max(1).values
