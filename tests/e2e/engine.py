"""One offline vLLM engine in a process of its own, and its prompts.

The module is both sides: tests call `run_engine`, which starts this file as a script, once per test process. The
script imports vLLM, which takes longer than to start a tiny engine, and forks for every engine: the fork loads the
model, answers every job of the request and writes the answers as JSON.
"""

import functools
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n",
    "Water boils at one hundred degrees Celsius because the pressure of",
    "Once upon a time there was a small dragon who did not like",
    "To install the package, open a terminal and type the following",
    "The three most important things to know about Python lists are",
    "In the year 1969 two astronauts walked on the surface of",
    "A good recipe for bread needs only flour, salt, yeast, water and",
)
# In place of sampling parameters.
EMBED = {"embed": True}
CLASSIFY = {"classify": True}
PROMPT_TOKENS = 11
NEW_TOKENS = 48


# Token ids, or a text and maybe the path of an image: {"prompt": ..., "image": ...}.
Prompt = list[int] | dict[str, str]
# Prompts; sampling parameters; for each prompt the folder of a LoRA adapter or "", if there are any.
Job = tuple[Sequence[Prompt], dict[str, Any]] | tuple[Sequence[Prompt], dict[str, Any], Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """An engine's answer to one prompt.

    Attributes:
        tokens: the new token ids.
        vector: embedding or class probabilities, of an EMBED or CLASSIFY job of a pooling engine.
        logprobs: per step, token id -> log probability of the engine's top tokens; empty if not asked for.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    vector: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EngineRun:
    """How an engine's process ended; `answers` is empty if it failed."""

    returncode: int
    log: str
    answers: list[list[Answer]]


def one_core_each() -> dict[str, str]:
    """The environment of two workers on one machine; skips the test where there are not two cores."""
    import pytest

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers need two cores")
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}


def greedy(max_tokens: int = NEW_TOKENS, **more: Any) -> dict[str, Any]:
    """Sampling parameters of a greedy job that never stops early."""
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more}


def beam(width: int, max_tokens: int) -> dict[str, Any]:
    """Sampling parameters of a job whose answers are the tokens of the best beam."""
    return {"beam": {"beam_width": width, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}}


def equal_length_prompts(folder: Path, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """The prompts as token ids of one length, so that transformers can batch them without padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"][:length] for text in PROMPTS]
    assert {len(ids) for ids in prompts} == {length}
    return prompts


class EngineParent:
    """The process that has imported vLLM and forks engines."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def run(self, order: dict[str, Any], timeout: float) -> int:
        """Fork an engine and wait for it; its exit status.

        Args:
            order: as `engine_of` takes it.
            timeout: seconds until the engine's process group is ended.

        Raises:
            subprocess.TimeoutExpired: after that.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        engine = int(self.process.stdout.readline())
        try:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("an engine", timeout)
        except BaseException:
            # Workers of a tensor-parallel engine are in the same group.
            os.killpg(engine, signal.SIGKILL)
            self.process.stdout.readline()
            raise
        return int(self.process.stdout.readline())


@functools.cache
def _parent() -> EngineParent:
    """Started when the first engine is needed; ends with this process, whose end closes its input."""
    return EngineParent()


def try_engine(
    model: Path,
    jobs: Sequence[Job],
    *,
    reload: Path | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 400,
    **options: Any,
) -> EngineRun:
    """Start an engine, run jobs, and return its answers and log.

    Args:
        model: folder of the model.
        jobs: each is handed to `LLM.generate` as one batch.
        reload: folder whose weights the engine then reloads, to run all jobs once more.
        environment: on top of this process's.
        timeout: seconds until the engine's process group is ended.
        options: of `vllm.LLM`, over the defaults here.
    """
    engine = {
        "model": str(model),
        "load_format": "pgsvd",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        **options,
    }
    with tempfile.TemporaryDirectory() as scratch:
        request, response, log = (Path(scratch) / name for name in ("request.json", "response.json", "log"))
        wanted = {"engine": engine, "jobs": list(jobs), "reload": str(reload or "")}
        request.write_text(json.dumps(wanted), encoding="utf-8")
        files = {"request": str(request), "response": str(response), "log": str(log)}
        returncode = _parent().run({**files, "environment": {**os.environ, **(environment or {})}}, timeout)
        text = log.read_text(encoding="utf-8", errors="replace")
        if returncode != 0:
            return EngineRun(returncode, text, [])
        answers = json.loads(response.read_text(encoding="utf-8"))
    rows = [
        [
            Answer(
                a["tokens"],
                [{int(k): v for k, v in step.items()} for step in a["logprobs"]],
                a.get("vector", []),
            )
            for a in job
        ]
        for job in answers
    ]
    return EngineRun(returncode, text, rows)


def run_engine(model: Path, jobs: Sequence[Job], **options: Any) -> list[list[Answer]]:
    """`try_engine` for an engine that must work; the answers of each job."""
    done = try_engine(model, jobs, **options)
    assert done.returncode == 0, f"the engine ended with {done.returncode}:\n{done.log[-6000:]}"
    return done.answers


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    """Only the token ids."""
    return [answer.tokens for answer in answers]


def asked_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    from PIL import Image

    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    if "image" not in prompt:
        return {"prompt": prompt["prompt"]}
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": Image.open(prompt["image"]).convert("RGB")}}


def answer(request: Path, response: Path) -> None:
    """The engine's side."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    wanted = json.loads(request.read_text(encoding="utf-8"))
    llm = LLM(**wanted["engine"])
    answers = []
    known: dict[str, LoRARequest] = {}
    jobs = wanted["jobs"]
    for number, (prompts, sampling, *adapters) in enumerate(jobs * 2 if wanted["reload"] else jobs):
        if number == len(jobs):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": wanted["reload"]})
        loras = []
        for path in adapters[0] if adapters else [""] * len(prompts):
            if path and path not in known:
                known[path] = LoRARequest(path, len(known) + 1, path)
            loras.append(known.get(path))
        asked = [asked_of(prompt) for prompt in prompts]
        if sampling in (EMBED, CLASSIFY):
            found = (
                [one.outputs.embedding for one in llm.embed(asked, use_tqdm=False)]
                if sampling == EMBED
                else [one.outputs.probs for one in llm.classify(asked, use_tqdm=False)]
            )
            answers.append([{"tokens": [], "logprobs": [], "vector": vector} for vector in found])
            continue
        if "beam" in sampling:
            searched = llm.beam_search(asked, BeamSearchParams(**sampling["beam"]))
            best = [one.sequences[0].tokens[len(ids) :] for one, ids in zip(searched, prompts, strict=True)]
            answers.append([{"tokens": row, "logprobs": []} for row in best])
            continue
        outputs = llm.generate(
            asked,
            SamplingParams(**sampling),
            use_tqdm=False,
            lora_request=loras if any(loras) else None,
        )
        answers.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        {token: entry.logprob for token, entry in step.items()}
                        for step in output.outputs[0].logprobs or []
                    ],
                }
                for output in outputs
            ]
        )
    response.write_text(json.dumps(answers), encoding="utf-8")


def engine_of(order: dict[str, Any]) -> None:
    """Be the engine of a request, in a new process.

    Args:
        order: paths of "request", "response" and "log", and the "environment".
    """
    import torch

    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
    for output in (1, 2):
        os.dup2(log, output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    answer(Path(order["request"]), Path(order["response"]))
    if not multiprocessing.active_children():
        # Nothing is left to be ended: taking the engine apart would take seconds.
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    """Fork an engine for every line of the input: write its process id, and its exit status when it ends."""
    replies = os.dup(1)
    os.dup2(2, 1)
    import vllm.entrypoints.llm
    import vllm.lora.request
    import vllm.sampling_params  # noqa: F401

    while line := sys.stdin.readline():
        engine = os.fork()
        if engine == 0:
            os.close(replies)
            engine_of(json.loads(line))
            return
        os.write(replies, f"{engine}\n".encode())
        _, status = os.waitpid(engine, 0)
        os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
