"""Data parallelism: two engines behind one server, each with the whole factored model."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.e2e.checkpoints import transformers_greedy
from tests.e2e.engine import one_core_each
from tests.support.server import serve

NEW_TOKENS = 24


@pytest.mark.slow
@pytest.mark.feature("Data parallelism")
def test_data_parallel_engines_match_transformers(
    tiny_compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in one_core_each().items():
        monkeypatch.setenv(name, value)
    prompts = torch.randint(2, 258, (8, 9), generator=torch.Generator().manual_seed(1)).tolist()
    options = ("--load-format", "pgsvd", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    with serve(tiny_compressed, tmp_path / "log", *options, "--data-parallel-size", "2") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

        def ask(prompt: list[int]) -> list[int]:
            answer = client.completions.create(
                model=server.model,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert answer.choices[0].model_extra is not None
            return list(answer.choices[0].model_extra["token_ids"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(ask, prompts))
        metrics = httpx.get(f"{server.url}/metrics").text
    assert found == transformers_greedy(tiny_compressed, prompts, NEW_TOKENS)
    counts = re.findall(r'^vllm:generation_tokens_total\{engine="(\d)".*\} (\S+)$', metrics, re.MULTILINE)
    assert {engine for engine, count in counts if float(count) > 0} == {"0", "1"}
