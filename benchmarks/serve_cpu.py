"""Decode and prefill speed of factored models in vLLM on CPU, relative to the dense model.

    python benchmarks/serve_cpu.py [--quick] [--http] [--json FILE] [--markdown FILE]

The models are those of random_model.py: TinyLlama-1.1B's shape with ranks that the planner chose. Each model has an
engine in a process of its own. The engines run in turn, dense, factored, dense, factored, so that other load on the
machine affects both. A speed-up is the median of dense times over the median of factored times; its bar is 0.9 of the
ideal of the smaller number of bytes (decode) or FLOPs (prefill), and 1.0 at 20 % removed. A model whose
log-probabilities differ from those of transformers prints no speed and ends the run.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import random_model
from benchmarks.random_model import Shape
from benchmarks.rows import write_rows
from pgsvd_vllm.format.schema import stored_size
from tests.support import reference_model

FORMS = ("factors", "pivot")
RATIOS = (0.2, 0.4, 0.6)
BATCHES = (1, 8)
DECODE_PROMPT, DECODE_STEPS = 32, 48
PREFILL = 512
# Log-probabilities in bf16, of a model of this size: 0.01 apart on average; another function is 1 off.
GATE = 0.1
SHARE_OF_IDEAL = 0.9


class Engine:
    """An offline vLLM engine in a process of its own that times requests.

    Attributes:
        script: the Python file that runs in that process.
    """

    script = __file__

    def __init__(
        self, folder: Path, log: Path, options: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # All cores: there is no server beside the engine.
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            **(environment or {}),
        }
        self.log = log
        self.output = log.open("wb")
        command = [sys.executable, self.script, "--engine", json.dumps({"model": str(folder), **options})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.output, env=environment, text=True
        )

    def __enter__(self) -> Self:
        self.start = self.read()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()

    def read(self) -> dict[str, Any]:
        """The next answer; raises RuntimeError with the end of the log where the process ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # anything else is vLLM's
                return json.loads(line)
        raise RuntimeError(f"the engine of {self.folder.name} ended:\n{self.log.read_text(errors='replace')[-4000:]}")

    def ask(self, batch: int, length: int, new: int, checked: bool = False) -> dict[str, Any]:
        """Generate `new` tokens for `batch` prompts of `length` tokens; seconds, and the tokens if `checked`."""
        assert self.process.stdin is not None
        request = {"batch": batch, "length": length, "new": new, "checked": checked}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()


def engine_main(options: dict[str, Any]) -> None:
    """The engine's side: one answer per line of standard input."""
    import psutil
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    if options.pop("piecewise", False):
        compile_layer_by_layer()
    begin = time.perf_counter()
    options.setdefault("load_format", "auto" if "-dense-" in Path(options["model"]).name else "pgsvd")
    llm = LLM(**options)
    seconds = time.perf_counter() - begin
    gc.collect()
    # glibc keeps memory that compilation and the warm-up run have freed; it is no part of the model.
    ctypes.CDLL(None).malloc_trim(0)
    loaded = psutil.Process().memory_info().rss
    start = {"seconds": seconds, "resident": loaded, "compiled": asdict(compilation_counter)}
    print(json.dumps(start), flush=True)
    generator = torch.Generator().manual_seed(1)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.randint(3, 32000, (request["batch"], request["length"]), generator=generator).tolist()
        checked = {"logprobs": 0} if request["checked"] else {}
        sampling = SamplingParams(
            temperature=0, max_tokens=request["new"], ignore_eos=True, detokenize=False, **checked
        )
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        answer: dict[str, Any] = {"seconds": seconds}
        if checked:
            first = outputs[0].outputs[0]
            logprobs = [next(iter(step.values())).logprob for step in first.logprobs]
            answer |= {"prompt": ids[0], "tokens": list(first.token_ids), "logprobs": logprobs}
        print(json.dumps(answer), flush=True)


def compile_layer_by_layer() -> None:
    """Make vLLM compile as it does on GPUs: on CPU it traces the model as one graph."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    platform_class = type(current_platform)
    original = platform_class.check_and_update_config

    def keep(vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.compile_sizes = []

    platform_class.check_and_update_config = staticmethod(keep)
    # A pass that undoes what only GPU kernels need; it asks for kernels that the CPU build lacks.
    FixFunctionalizationPass.__call__ = lambda _self, _graph: None


def engine_options() -> dict[str, Any]:
    """The same for every engine."""
    return {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False}


@torch.inference_mode()
def check(engine: Engine) -> float:
    """Mean distance of an engine's log-probabilities from transformers'; raises RuntimeError above GATE."""
    from transformers import AutoModelForCausalLM

    import pgsvd_vllm.hf  # noqa: F401  (registers the format)

    answer = engine.ask(1, DECODE_PROMPT, 16, checked=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(engine.folder, dtype="auto").eval().to(device)
    ids = torch.tensor([answer["prompt"] + answer["tokens"]], device=device)
    expected = model(ids).logits[0, DECODE_PROMPT - 1 : -1].float().log_softmax(-1).cpu()
    chosen = expected.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
    gap = float((chosen - torch.tensor(answer["logprobs"])).abs().mean())
    if not gap < GATE:
        raise RuntimeError(f"{engine.folder.name}: log-probabilities differ from those of transformers by {gap:.2f}")
    return gap


def in_turn(engines: Sequence[Engine], rounds: int, batch: int, length: int, steps: int) -> list[list[float]]:
    """Seconds of a decode step if `steps` > 0, else of a prefill; one list per engine."""
    found: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, times in zip(engines, found, strict=True):
            first = engine.ask(batch, length, 1)["seconds"]
            if steps:
                first = (engine.ask(batch, length, steps + 1)["seconds"] - first) / steps
            times.append(first)
    return found


def sizes(form: str, ratio: float, shape: Shape) -> tuple[float, float]:
    """Remaining shares of the dense model's bytes read per decode step and of its FLOPs of a prefill."""
    table = random_model.modules(form, ratio, shape)
    shapes = {name: (rows, columns) for name, _, _, rows, columns in random_model.projections(shape)}
    dense = sum(rows * columns for rows, columns in shapes.values())
    saved = sum(
        shapes[name][0] * shapes[name][1] - stored_size(module.form, *shapes[name], module.rank)
        for name, module in table.items()
    )
    head = shape.vocab_size * shape.hidden_size
    # Scores and values, over half of the square: causal.
    attention = shape.num_hidden_layers * shape.hidden_size * PREFILL
    return 1 - saved / (dense + head), 1 - saved / (dense + attention)


def measure(
    form: str,
    ratio: float,
    rounds: int,
    log: Path,
    shape: Shape = random_model.TINYLLAMA,
    batches: Sequence[int] = BATCHES,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """One row per decode batch size, one of prefill, one of memory; `options` are further options of vLLM."""
    byte_ratio, flop_ratio = sizes(form, ratio, shape)
    with ExitStack() as stack:
        engines = []
        for folder in (random_model.folder(shape=shape), random_model.folder(form, ratio, shape)):
            file = log.with_name(f"{log.stem}-{folder.name}.log")
            engines.append(stack.enter_context(Engine(folder, file, engine_options() | options)))
        for engine in engines:
            check(engine)
        name = f"{form} {ratio:.0%}"

        def row(case: str, times: list[list[float]], ideal: float, tokens: int) -> dict[str, Any]:
            dense, factored = map(statistics.median, times)
            bar = 1.0 if ratio == RATIOS[0] else SHARE_OF_IDEAL * ideal
            spread = [f"{tokens / max(t):.1f} to {tokens / min(t):.1f}" for t in times]
            return {
                "case": f"{name} {case}",
                "value": dense / factored,
                "bar": bar,
                "ok": dense / factored >= bar,
                "ideal": ideal,
                "dense tokens/s": tokens / dense,
                "factored tokens/s": tokens / factored,
                "dense spread": spread[0],
                "factored spread": spread[1],
            }

        for batch in batches:
            times = in_turn(engines, rounds, batch, DECODE_PROMPT, DECODE_STEPS)
            yield row(f"decode batch {batch}", times, 1 / byte_ratio, batch)
        yield row(f"prefill {PREFILL}", in_turn(engines, 2 * rounds, 1, PREFILL, 0), 1 / flop_ratio, PREFILL)
        files = [sum(f.stat().st_size for f in e.folder.glob("*.safetensors")) for e in engines]
        # The dense engine's own overhead, and the factored weights.
        implied = engines[0].start["resident"] - files[0] + files[1]
        resident = engines[1].start["resident"]
        value = resident / implied
        yield {
            "case": f"{name} resident memory",
            "value": value,
            "bar": 1.05,
            "ok": value <= 1.05,
            "excess MB": (resident - implied) / 1e6,
        }


def http_speed(form: str, ratio: float, rounds: int, log: Path) -> Iterator[dict[str, Any]]:
    """Generated tokens per second through `vllm serve`, with both servers up and requests in turn."""
    from openai import OpenAI

    from tests.support.server import serve

    options = ("--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "8", "--no-enable-prefix-caching")
    with ExitStack() as stack:
        clients = []
        for folder in (random_model.folder(), random_model.folder(form, ratio)):
            file = log.with_name(f"{log.stem}-{folder.name}-http.log")
            more = () if folder.name.startswith("tinyllama-dense") else ("--load-format", "pgsvd")
            server = stack.enter_context(serve(folder, file, *options, *more))
            clients.append((OpenAI(base_url=f"{server.url}/v1", api_key="none"), str(folder)))

        def one(client: OpenAI, model: str, number: int) -> None:
            prompt = [3 + (7919 * (number + i)) % 31000 for i in range(DECODE_PROMPT)]
            client.completions.create(
                model=model, prompt=prompt, max_tokens=DECODE_STEPS, temperature=0, extra_body={"ignore_eos": True}
            )

        for batch in BATCHES:
            found: list[list[float]] = [[], []]
            with ThreadPoolExecutor(batch) as pool:
                for turn in range(rounds + 1):
                    for (client, model), rates in zip(clients, found, strict=True):
                        begin = time.perf_counter()
                        list(pool.map(lambda n, c=client, m=model: one(c, m, n), range(batch)))
                        if turn:  # the first warms up
                            rates.append(batch * DECODE_STEPS / (time.perf_counter() - begin))
            dense, factored = map(statistics.median, found)
            yield {
                "case": f"{form} {ratio:.0%} HTTP batch {batch}",
                "value": factored / dense,
                "bar": None,
                "ok": True,
                "dense tokens/s": dense,
                "factored tokens/s": factored,
            }


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per row; rows without a speed, such as memory, follow below the table."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm", "torch"))
    lines = [f"{platform.machine()}, {os.cpu_count()} cores, {versions}", ""]
    lines += ["| case | dense tokens/s | factored tokens/s | speed-up | ideal | bar |", "|---" * 6 + "|"]
    for row in rows:
        if "dense tokens/s" in row:
            numbers = [row.get(key) for key in ("dense tokens/s", "factored tokens/s", "value", "ideal", "bar")]
            cells = ["" if n is None else f"{n:.1f}" if i < 2 else f"{n:.2f}" for i, n in enumerate(numbers)]
            lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{row['case']}: {row['value']:.3f}" for row in rows if "dense tokens/s" not in row)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--http", action="store_true", help="through the HTTP server as well")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        engine_main(arguments.engine)
        return 0
    log = reference_model.cache_folder() / "serve-cpu"
    log.parent.mkdir(parents=True, exist_ok=True)
    rounds = 3 if arguments.quick else 7
    rows: list[dict[str, Any]] = []
    for form in arguments.forms:
        for ratio in arguments.ratios:
            found = [measure(form, ratio, rounds, log)]
            if arguments.http:
                found.append(http_speed(form, ratio, rounds, log))
            for part in found:
                for row in part:
                    rows.append(row)
                    bar = "" if row["bar"] is None else f", bar {row['bar']:.2f} {'ok' if row['ok'] else 'MISSED'}"
                    speed = ""
                    if "dense tokens/s" in row:
                        speed = f" ({row['dense tokens/s']:.1f} -> {row['factored tokens/s']:.1f} tokens/s)"
                    print(f"{row['case']:32} {row['value']:.2f}{speed}{bar}", flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
