"""A compressed model as the draft model of its dense parent: acceptance rate and speed.

    python benchmarks/draft.py DENSE DRAFT... [--num-speculative-tokens N] [--quick] [--json FILE]

Every draft model speculates for the dense model, with greedy sampling, one prompt after the other. In float32 the
tokens must be those of the dense model alone, else the run ends; the speed is measured in bfloat16, compiled
(`--quick`: not compiled, since that takes minutes per engine). Each engine has a process of its own and runs in turn
with the dense one.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import write_rows
from benchmarks.serve_cpu import Engine
from tests.support.reference_model import cache_folder

PROMPTS = (
    "The history of the city begins in the twelfth century, when",
    "Photosynthesis is the process by which plants",
    "Dear customer, thank you for your letter of last week. We are sorry to",
    "The main difference between a list and a tuple in Python is that",
    "She opened the door and saw that the room was empty. On the table",
    "In economics, inflation is usually measured by",
    "The recipe is simple: mix the flour with two eggs, then",
    "Many people believe that the moon causes the tides because",
)
NEW_TOKENS = 64
ROUNDS = 3


class DraftEngine(Engine):
    """The dense model, alone or with a draft model."""

    script = __file__

    def __init__(self, model: Path, draft: Path | None, speculated: int, dtype: str, compiled: bool) -> None:
        self.name = draft.name if draft else "dense alone"
        options: dict[str, Any] = {
            "dtype": dtype,
            "enforce_eager": not compiled,
            "max_model_len": 256,
            "max_num_seqs": 1,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if draft:
            options["speculative_config"] = {"model": str(draft), "num_speculative_tokens": speculated}
        super().__init__(model, cache_folder() / f"draft-{self.name.replace(' ', '-')}-{dtype}.log", options)

    def answer(self) -> dict[str, Any]:
        """Answer all prompts: `tokens`, `seconds`, and counters of drafted and accepted tokens so far."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()


def engine_main(options: dict[str, Any]) -> None:
    """The engine's side: one answer per line of standard input."""
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        # One after the other: a draft model is for few concurrent requests.
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in PROMPTS]
        seconds = time.perf_counter() - begin
        counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        answer = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "seconds": seconds,
            "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
            "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
            "steps": counters.get("vllm:spec_decode_num_drafts", 0),
        }
        print(json.dumps(answer), flush=True)


def main() -> int:
    """Check, measure, print a table, write JSON."""
    if sys.argv[1:2] == ["--engine"]:
        engine_main(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--num-speculative-tokens", type=int, default=3, metavar="N", help="draft tokens per step")
    parser.add_argument("--quick", action="store_true", help="not compiled")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    speculated = arguments.num_speculative_tokens
    everyone: list[Path | None] = [None, *arguments.drafts]

    answers: list[list[list[int]]] = []
    for draft in everyone:
        with DraftEngine(arguments.dense, draft, speculated, "float32", compiled=False) as engine:
            answers.append(engine.answer()["tokens"])
        if answers[-1] != answers[0]:
            sys.exit(f"draft.py: error: with {engine.name} as draft the dense model says something else in float32")
    with ExitStack() as stack:
        engines = [
            stack.enter_context(DraftEngine(arguments.dense, draft, speculated, "bfloat16", not arguments.quick))
            for draft in everyone
        ]
        found = [[engine.answer() for engine in engines] for _ in range(ROUNDS + 1)][1:]  # the first warms up
    dense = statistics.median(row[0]["seconds"] for row in found)
    rows: list[dict[str, object]] = []
    print("| draft | accepted | tokens a step | speed of dense alone |")
    print("|---|---|---|---|")
    for number, draft in enumerate(arguments.drafts, 1):
        last = found[-1][number]
        accepted, speed = (
            last["accepted"] / last["drafted"],
            dense / statistics.median(r[number]["seconds"] for r in found),
        )
        print(f"| {draft.name} | {accepted:.2f} | {1 + last['accepted'] / last['steps']:.2f} | {speed:.2f} |")
        rows.append({"case": f"{draft.name}, tokens of the dense model alone", "value": 1, "bar": 1, "ok": True})
        rows.append({"case": f"{draft.name}, accepted", "value": accepted, "bar": None, "ok": True})
        rows.append({"case": f"{draft.name}, speed of dense alone", "value": speed, "bar": None, "ok": True})
    print(f"dense alone: {len(PROMPTS) * NEW_TOKENS / dense:.1f} tokens/s; {speculated} draft tokens a step")
    write_rows(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
