"""`vllm serve DIR --load-format pgsvd` over HTTP, from the client's side."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from benchmarks.reliability.load import GAUGES, Service, greedy, hang_up, wait_until_idle
from tests.e2e.checkpoints import transformers_greedy
from tests.e2e.engine import PROMPTS, equal_length_prompts
from tests.support.server import Server, serve, tail


@pytest.fixture(scope="module")
def server(smollm2_compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the module.

    It computes in float32: batches round differently than single requests, and only in float32 greedy
    answers do not depend on the other requests.
    """
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    options = ("--load-format", "pgsvd", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
    with serve(smollm2_compressed, log, *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: openai.OpenAI, server: Server, prompt: str | list[int], tokens: int = 24) -> str:
    answer = client.completions.create(
        model=server.model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_models_lists_the_checkpoint(client: openai.OpenAI, server: Server) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [server.model]
    assert models[0].model_extra is not None
    assert models[0].model_extra["max_model_len"] == 1024


def test_health_and_version_over_plain_http(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"].startswith("0.3")


def test_server_uses_the_pgsvd_loader(server: Server) -> None:
    log = tail(server.log, 200_000)
    assert "quantization=pgsvd" in log
    assert "load_format=pgsvd" in log


@pytest.mark.feature("OpenAI server: completions")
def test_greedy_text_matches_transformers(client: openai.OpenAI, server: Server, smollm2_compressed: Path) -> None:
    prompts = equal_length_prompts(smollm2_compressed)[:4]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_compressed)
    expected = transformers_greedy(smollm2_compressed, prompts, 16)
    for prompt, tokens in zip(prompts, expected, strict=True):
        answer = client.completions.create(
            model=server.model, prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 16)


@pytest.mark.feature("log probabilities")
def test_logprobs_belong_to_the_chosen_tokens(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(
        model=server.model,
        prompt=PROMPTS[0],
        max_tokens=8,
        temperature=0,
        logprobs=3,
        extra_body={"skip_special_tokens": False, "ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for token, own, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert own < 0
        assert len(top) == 3
        assert top[token] == own == max(top.values())


@pytest.mark.feature("several choices a request (n)")
def test_two_choices_are_sampled_independently(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(
        model=server.model, prompt=PROMPTS[3], max_tokens=24, temperature=1.0, n=2, seed=11
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text


def test_stop_ends_the_text_before_the_stop_string(client: openai.OpenAI, server: Server) -> None:
    whole = complete(client, server, PROMPTS[3])
    words = whole.split()
    word = words[len(words) // 2]
    answer = client.completions.create(
        model=server.model,
        prompt=PROMPTS[3],
        max_tokens=24,
        temperature=0,
        stop=[word],
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(word)]


@pytest.mark.feature("structured output")
def test_structured_output_follows_its_grammar(client: openai.OpenAI, server: Server) -> None:
    def ask(**structured: object) -> str:
        answer = client.completions.create(
            model=server.model,
            prompt="Is Paris the capital of France? Answer:",
            max_tokens=48,
            temperature=0,
            extra_body={"structured_outputs": structured},
        )
        return answer.choices[0].text

    assert ask(choice=["certainly", "hardly"]) in ("certainly", "hardly")
    assert re.fullmatch("(yes|no), [0-9]{2} times", ask(regex="(yes|no), [0-9]{2} times"))


def test_a_seed_makes_sampling_reproducible(client: openai.OpenAI, server: Server) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model=server.model, prompt=PROMPTS[3], max_tokens=24, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


@pytest.mark.feature("chat, streaming")
def test_chat_stream_equals_the_whole_answer(client: openai.OpenAI, server: Server) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is the capital of France?"}
    ]
    whole = client.chat.completions.create(model=server.model, messages=messages, max_tokens=24, temperature=0)
    pieces, reasons = [], []
    stream = client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=24, temperature=0, stream=True
    )
    for event in stream:
        pieces.append(event.choices[0].delta.content or "")
        reasons.append(event.choices[0].finish_reason)
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 3
    assert reasons[-1] == whole.choices[0].finish_reason
    assert all(reason is None for reason in reasons[:-1])


def test_plain_http_stream_is_well_formed(server: Server) -> None:
    body = {"model": server.model, "prompt": PROMPTS[1], "max_tokens": 6, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.feature("continuous batching")
def test_concurrent_answers_equal_sequential_ones(client: openai.OpenAI, server: Server) -> None:
    """32 requests of different lengths at once: batches have several shapes, and no answer is lost or mixed up."""
    prompts = [f"{prompt} {'indeed ' * (i // len(PROMPTS))}".strip() for i, prompt in enumerate(PROMPTS * 4)]
    assert len(set(prompts)) == 32
    sequential = [complete(client, server, prompt, 12 + i % 5) for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [pool.submit(complete, client, server, prompt, 12 + i % 5) for i, prompt in enumerate(prompts)]
        concurrent = [future.result(timeout=300) for future in futures]
    assert concurrent == sequential
    assert len(set(concurrent)) > 16


def test_hang_ups_leave_nothing_running(server: Server) -> None:
    service = Service(server.url, server.model, vocabulary=49152, longest=1024, key="none")
    before = greedy(service)
    hang_up(service, clients=16)
    assert wait_until_idle(service, 10) == dict.fromkeys(GAUGES, 0)
    assert greedy(service) == before


def test_server_survives_bad_requests(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="1024"):
        complete(client, server, [5] * 1100)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="a", max_tokens=1)
    assert httpx.post(f"{server.url}/v1/completions", content=b"{not json").status_code in (400, 422)
    assert complete(client, server, PROMPTS[0])
    assert server.process.poll() is None
