"""Clients of a vLLM server: many requests at once, clients that hang up, and requests that a server must refuse."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

TIMEOUT = 600.0
# vLLM's gauges of running and waiting requests and of the share of the KV cache in use.
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Service:
    """A served model.

    Attributes:
        url: of the server.
        model: name of the model.
        vocabulary: token ids below it are valid.
        longest: tokens of a prompt and its answer together.
        key: for the Authorization header.
    """

    url: str
    model: str
    vocabulary: int
    longest: int
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request."""
        return {"Authorization": f"Bearer {self.key}"}


def requests_of_mixed_lengths(service: Service, count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of completion requests: prompts of 1 token to most of the context, short and long answers, some streamed.

    None has a seed of its own: vLLM 0.32 ends its engine on CPU when it prefills such a request in pieces.

    Args:
        service: that they are for.
        count: number of requests.
        seed: of the draw.
    """
    random = Random(seed)
    bodies = []
    for _ in range(count):
        room = service.longest - 1
        length = random.choice((1, 2, random.randint(3, 32), random.randint(16, room // 4), random.randint(16, room)))
        tokens = min(random.choice((1, 4, 8, 16, 16, 32, 64)), service.longest - length)
        body = {
            "model": service.model,
            "prompt": [random.randrange(3, service.vocabulary) for _ in range(length)],
            "max_tokens": tokens,
            "temperature": random.choice((0, 0, 0.7, 1.5)),
            "ignore_eos": True,
            "stream": random.random() < 0.5,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        bodies.append(body)
    return bodies


async def answered(client: httpx.AsyncClient, body: dict[str, Any]) -> str | None:
    """Send one request; None if it was answered with as many tokens as it asked for, else what went wrong."""
    try:
        if not body["stream"]:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                return f"status {answer.status_code}: {answer.text[:200]}"
            usage, ended = answer.json()["usage"], True
        else:
            usage, ended = None, False
            async with client.stream("POST", "/v1/completions", json=body) as stream:
                if stream.status_code != 200:
                    return f"status {stream.status_code}"
                async for line in stream.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line:
                        usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    if not ended or usage is None or usage["completion_tokens"] != body["max_tokens"]:
        return f"ended {ended}, usage {usage}, asked for {body['max_tokens']} tokens"
    return None


async def _send_all(
    service: Service, bodies: Sequence[dict[str, Any]], clients: int, note: Callable[[int], None]
) -> list[str]:
    waiting = iter(bodies)
    failures: list[str] = []
    done = 0

    async def one_client() -> None:
        nonlocal done
        async with httpx.AsyncClient(base_url=service.url, headers=service.headers, timeout=TIMEOUT) as client:
            for body in waiting:
                wrong = await answered(client, body)
                failures.extend([wrong] if wrong else [])
                done += 1
                note(done)

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return failures


def send_all(
    service: Service, bodies: Sequence[dict[str, Any]], clients: int, note: Callable[[int], None]
) -> list[str]:
    """Send requests from some clients at once, each client one after the other.

    Args:
        service: that answers.
        bodies: of the requests.
        clients: that share the requests.
        note: is called with the number of answered requests after each answer.

    Returns:
        What went wrong, an entry per failed request.
    """
    return asyncio.run(_send_all(service, bodies, clients, note))


async def _hang_up(service: Service, clients: int, events: int) -> None:
    async def one_client(number: int) -> None:
        body = {"model": service.model, "prompt": [3 + number] * 16, "max_tokens": service.longest - 16}
        body |= {"ignore_eos": True, "stream": True}
        async with (
            httpx.AsyncClient(base_url=service.url, headers=service.headers, timeout=TIMEOUT) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            if number % 4 == 0:
                return  # before the first event
            seen = 0
            async for _ in stream.aiter_lines():
                seen += 1
                if seen >= events + number % 8:
                    return

    await asyncio.gather(*(one_client(number) for number in range(clients)))


def hang_up(service: Service, clients: int, events: int = 4) -> None:
    """Let clients ask for long streams at once and close their connections after some events, or before the first."""
    asyncio.run(_hang_up(service, clients, events))


def gauges(service: Service) -> dict[str, float]:
    """The values of GAUGES now, summed over engines."""
    found = dict.fromkeys(GAUGES, 0.0)
    for line in httpx.get(f"{service.url}/metrics", timeout=30).text.splitlines():
        name = line.partition("{")[0]
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found


def wait_until_idle(service: Service, seconds: float) -> dict[str, float]:
    """The gauges once all are 0, or as they are after some seconds."""
    deadline = time.monotonic() + seconds
    while any((now := gauges(service)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def bad_requests(service: Service) -> list[tuple[str, bytes]]:
    """Requests that a server must refuse: what is wrong with each, and its body."""
    good: dict[str, Any] = {"model": service.model, "prompt": [5], "max_tokens": 4}
    wrong: dict[str, dict[str, Any]] = {
        "prompt too long": {"prompt": [5] * (service.longest + 1)},
        "negative max_tokens": {"max_tokens": -1},
        "max_tokens a text": {"max_tokens": "many"},
        "token id outside of the vocabulary": {"prompt": [service.vocabulary + 10**6]},
        "negative token id": {"prompt": [-5]},
        "no prompt": {"prompt": None},
        "temperature below 0": {"temperature": -1},
        "n of 0": {"n": 0},
        "top_p above 1": {"top_p": 2},
        "too many log probabilities": {"logprobs": 10**6},
        "invalid regular expression": {"structured_outputs": {"regex": "(("}},
    }
    bodies = [(what, json.dumps(good | change).encode()) for what, change in wrong.items()]
    return [*bodies, ("not JSON", b"{not json"), ("nothing", b""), ("a list", b"[]"), ("not UTF-8", b"\xff\xfe{}")]


def not_refused(service: Service) -> list[str]:
    """Send every bad request; those that were not answered with a status from 400 to 499."""
    found = []
    headers = service.headers | {"Content-Type": "application/json"}
    for what, body in bad_requests(service):
        answer = httpx.post(f"{service.url}/v1/completions", content=body, headers=headers, timeout=60)
        if not 400 <= answer.status_code < 500:
            found.append(f"{what}: status {answer.status_code}")
    return found


def greedy(service: Service) -> list[str]:
    """Greedy answers to two prompts."""
    bodies = [
        {"model": service.model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        for prompt in ([7] * 9, list(range(5, 45)))
    ]
    answers = [
        httpx.post(f"{service.url}/v1/completions", json=body, headers=service.headers, timeout=TIMEOUT)
        for body in bodies
    ]
    return [str(answer.raise_for_status().json()["choices"][0]["text"]) for answer in answers]
