"""`make demo`: compress a real model, serve it with vLLM, ask it, and compare it with the dense one.

Every figure of the table is measured in this run. Compressed model and unpacked weights stay in the
user's cache, so a second run starts at the server.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from openai import OpenAI

import pgsvd_vllm
from benchmarks.questions import NEW_TOKENS, Question, kept, questions, right, side_by_side
from tests.support import reference_model
from tests.support.server import Server, serve

HELD_OUT_WINDOWS, WINDOW = 24, 512
DECODE_TOKENS = 96
CONCURRENT = 8
QUESTION = "What is the capital of France, and what is it known for?"
OPENING = "A list in Python is"


def step(text: str) -> None:
    """Announce a stage."""
    print(f"\n== {text}", flush=True)


def compressed_folder(dense: Path, ratio: str) -> Path:
    """The compressed model, made by the command line unless an earlier run left it."""
    folder = reference_model.cache_folder() / f"demo-{dense.name}-{ratio}-{pgsvd_vllm.__version__}"
    if folder.is_dir():
        print(f"{folder} is there from an earlier run")
        return folder
    command = [str(Path(sys.executable).with_name("pgsvd-vllm")), "compress", str(dense), "-o", str(folder)]
    command += ["--ratio", ratio]
    if folder.with_name(folder.name + ".partial").exists():
        command.append("--resume")
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return folder


def held_out_perplexity(folder: Path, tokens_from: Path) -> float:
    """Perplexity on Python's docstrings, which are not in the calibration text."""
    from transformers import AutoModelForCausalLM

    import pgsvd_vllm.hf  # noqa: F401  (registers the format)
    from pgsvd_vllm.evaluation.perplexity import held_out_prose, perplexity
    from pgsvd_vllm.offline.data import text, tokens

    tokenizer = text.load_tokenizer(tokens_from)
    found = tokens.tokenize(tokenizer, [held_out_prose()], "docstrings")
    windows = tokens.cut_windows(found, HELD_OUT_WINDOWS, WINDOW, 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return perplexity(model, windows.ids, desc=f"perplexity {folder.name}")


def ask(server: Server) -> None:
    """A chat question and a completion, streamed."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"chat> {QUESTION}\n      ", end="", flush=True)
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=60,
        temperature=0,
        stream=True,
    )
    for event in chat:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print(f"\ncompletion> {OPENING}", end="", flush=True)
    for part in client.completions.create(model=model, prompt=OPENING, max_tokens=40, temperature=0, stream=True):
        print(part.choices[0].text, end="", flush=True)
    print()


def answers(server: Server) -> list[str]:
    """Greedy answers to the ten questions of `benchmarks/questions.py --quick`."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id

    def one(question: Question) -> str:
        messages = [{"role": "user", "content": question.text}]
        chat = client.chat.completions.create(model=model, messages=messages, max_tokens=NEW_TOKENS, temperature=0)
        return chat.choices[0].message.content or ""

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(one, questions(quick=True)))


def tokens_per_second(server: Server, requests: int) -> float:
    """Generated tokens per second over `requests` concurrent completions; best of three rounds."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id

    def one(number: int) -> int:
        answer = client.completions.create(
            model=model,
            prompt=f"{number}. {OPENING}",
            max_tokens=DECODE_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.usage.completion_tokens

    rates = []
    with ThreadPoolExecutor(requests) as pool:
        for _ in range(3):
            start = time.perf_counter()
            generated = sum(pool.map(one, range(requests)))
            rates.append(generated / (time.perf_counter() - start))
    return max(rates)


def parameters(folder: Path) -> int:
    """Parameters stored in a folder's safetensors files."""
    from pgsvd_vllm.format.reader import read_headers

    return sum(info.numel for path in folder.glob("*.safetensors") for info in read_headers(path).values())


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", default="0.2", help="share of the projections' parameters to remove")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    arguments = parser.parse_args()
    begun = time.monotonic()

    step("the dense model: SmolLM2-135M-Instruct")
    dense = reference_model.smollm2()
    print(dense)
    step("compress")
    compressed = compressed_folder(dense, arguments.ratio)

    step("perplexity on text that was not used for calibration")
    columns: dict[str, dict[str, float]] = {}
    found: dict[str, list[str]] = {}
    for name, folder in (("dense", dense), ("compressed", compressed)):
        columns[name] = {
            "parameters (M)": parameters(folder) / 1e6,
            "bytes on disk (MB)": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6,
            "perplexity, held out": held_out_perplexity(folder, dense),
        }

    for name, folder, options in (
        ("compressed", compressed, ("--load-format", "pgsvd")),
        ("dense", dense, ()),
    ):
        step(f"vllm serve {folder} {' '.join(options)}")
        log = reference_model.cache_folder() / f"demo-{name}.log"
        with serve(folder, log, *options, "--enforce-eager", "--max-model-len", "1024") as server:
            print(f"up at {server.url}, log in {log}", flush=True)
            if name == "compressed":
                ask(server)
            found[name] = answers(server)
            columns[name]["tokens/s, 1 request"] = tokens_per_second(server, 1)
            columns[name][f"tokens/s, {CONCURRENT} requests"] = tokens_per_second(server, CONCURRENT)
            columns[name]["peak memory (MB)"] = server.peak_bytes() / 1e6
        print("stopped")

    step("ten questions, dense beside compressed")
    asked = questions(quick=True)
    for question, old, new in zip(asked, found["dense"], found["compressed"], strict=True):
        print(side_by_side(question, {"dense": old, "compressed": new}))
    same, known = kept(asked, found["dense"], found["compressed"])
    print(f"\nof the {known} that the dense model answers right, the compressed one keeps {same}")
    for name, given in found.items():
        columns[name]["right answers of ten"] = right(asked, given)

    step("dense vs compressed, measured in this run")
    print(f"{'':24}{'dense':>12}{'compressed':>12}{'ratio':>8}")
    for row, value in columns["dense"].items():
        other = columns["compressed"][row]
        print(f"{row:24}{value:12.2f}{other:12.2f}{other / value:8.2f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm", "torch", "transformers"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}")
    print(f"took {(time.monotonic() - begun) / 60:.1f} minutes; the compressed model stays in {compressed}")
    if arguments.json:
        rows = [
            {"case": f"{row}, {name}", "value": value, "bar": None, "ok": True}
            for name, column in columns.items()
            for row, value in column.items()
        ]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
