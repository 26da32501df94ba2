"""Time and memory of every stage of `compress`, from 135M to 7B parameters, beside what the plan says before the run.

    python benchmarks/compress_scale.py [--shapes NAME ...] [--layers N] [--windows N] [--refine M]
        [--memory-budget SIZE] [--quick] [--json FILE]

The models are Llamas with random weights in the shapes of real models. With --layers only so many of their layers are
made: memory depends on the width of a layer and not on their number, but for distillation, and time is proportional to
it. Each shape runs in a process of its own, whose memory is sampled every 20 ms; the stage is read from the call stack.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_model import LLAMA_2_7B, TINYLLAMA, Shape, folder, projections
from benchmarks.rows import write_rows
from pgsvd_vllm.cli.compress import byte_count

SHAPES = {
    "135M": Shape("smollm2-135m", 576, 1536, 30, 9, 3, 49152),
    "0.5B": Shape("qwen2-0.5b", 896, 4864, 24, 14, 2, 151936),
    "1.1B": TINYLLAMA,
    "3B": Shape("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256),
    "7B": LLAMA_2_7B,
}
LENGTH = 1024
# Function of the pipeline -> stage; the innermost frame decides.
STAGES = {
    "_collect": "calibration",
    "run_lm_head": "lm_head",
    "lm_head_calibration": "lm_head",
    "_backward": "gradients",
    "factor_layers": "factors",
    "_trained": "distillation",
    "round_layers": "quantization",
    "write_checkpoint": "checkpoint",
}
# Largest relative error of the plan's memory and time.
MEMORY_BAR, TIME_BAR = 0.15, 0.30
EVERY = 0.02


@dataclass
class Watch:
    """Samples the stage and the resident memory of this process in a thread.

    Attributes:
        seconds: stage -> time.
        peak: stage -> largest resident memory in bytes.
    """

    main: int = field(default_factory=threading.get_ident)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Sample until `stopped` is set."""
        last = time.monotonic()
        while not self.stopped.wait(EVERY):
            stage = stage_of(sys._current_frames()[self.main])
            now = time.monotonic()
            self.seconds[stage] += now - last
            self.peak[stage] = max(self.peak[stage], resident())
            last = now


def stage_of(frame: FrameType | None) -> str:
    """The stage that a call stack belongs to."""
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        if "offline" not in code.co_filename:
            continue
        if code.co_name in STAGES:
            return STAGES[code.co_name]
        if frame is None and code.co_filename.endswith("layer_passes.py"):
            return "factors"  # a forward pass that can be paused has a stack of its own
    return "other"


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def measure(model: Path, windows: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compress a model in this process; its stages, and the plan's estimate."""
    from pgsvd_vllm.offline.compress import compress
    from pgsvd_vllm.offline.options import CompressOptions
    from pgsvd_vllm.offline.planning.memory import stage_bytes
    from pgsvd_vllm.offline.planning.plan import Plan
    from pgsvd_vllm.offline.planning.resources import estimate

    planned: dict[str, Any] = {}

    def look(plan: Plan) -> None:
        need = estimate(plan)
        planned.update(memory=need.memory, seconds=need.seconds, stages=stage_bytes(plan))

    with tempfile.TemporaryDirectory() as made:
        text = Path(made) / "text.txt"
        vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        draw = random.Random(0)
        text.write_text(" ".join(f"t{draw.randrange(3, vocabulary)}" for _ in range((windows + 4) * LENGTH + 64)))
        watch = Watch()
        thread = threading.Thread(target=watch.run, daemon=True)
        thread.start()
        given = CompressOptions(
            str(model),
            Path(made) / "out",
            dataset=(str(text),),
            num_calibration_samples=windows,
            max_seq_length=LENGTH,
            ratio=0.2,
            serve_on="cpu",
        )
        compress(replace(given, **options), lambda line: print(line, file=sys.stderr), look)
        watch.stopped.set()
        thread.join()
    return {"planned": planned, "seconds": dict(watch.seconds), "peak": dict(watch.peak)}


def in_process(shape: Shape, windows: int, options: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    request = json.dumps([str(folder(shape=shape)), windows, options])
    done = subprocess.run([sys.executable, __file__, "--measure", request], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(name: str, parameters: int, tokens: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one shape; prints them."""
    rows = []
    gib, planned = 2**30, found["planned"]
    for stage, seconds in found["seconds"].items():
        peak = found["peak"][stage]
        cost = 1e12 * seconds / parameters / tokens
        expected = planned["stages"].get(stage)
        shown = f"planned {expected / gib:6.2f}" if expected else ""
        print(f"{name:6} {stage:13} {seconds:8.1f} s {cost:8.2f} s/1e12 {peak / gib:6.2f} GiB {shown}", flush=True)
        rows.append({"case": f"{name} {stage}, s", "value": seconds, "bar": None, "ok": True})
        rows.append({"case": f"{name} {stage}, s per 1e12 parameters x tokens", "value": cost, "bar": None, "ok": True})
        rows.append({"case": f"{name} {stage}, GiB", "value": peak / gib, "bar": None, "ok": True})
    for what, value, bar in (
        ("memory", planned["memory"] / max(found["peak"].values()), MEMORY_BAR),
        ("time", planned["seconds"] / sum(found["seconds"].values()), TIME_BAR),
    ):
        ok = abs(value - 1) <= bar
        print(f"{name:6} planned {what} over measured {value:.2f} {'ok' if ok else 'MISSED'}", flush=True)
        rows.append({"case": f"{name} planned {what} over measured", "value": value, "bar": 1 + bar, "ok": ok})
    return rows


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", type=int, metavar="N", help="make only so many layers")
    parser.add_argument("--windows", type=int, default=128, metavar="N", help=f"of {LENGTH} tokens (default 128)")
    parser.add_argument("--refine", type=float, metavar="MINUTES", help="as of compress; 0 leaves distillation out")
    parser.add_argument("--memory-budget", metavar="SIZE", help="as of compress")
    parser.add_argument("--quick", action="store_true", help="135M alone, 4 layers, 16 windows")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, windows, options = json.loads(arguments.measure)
        print(json.dumps(measure(Path(model), windows, options)))
        return 0
    if arguments.quick:
        arguments.shapes, arguments.layers, arguments.windows = ["135M"], 4, 16
    options: dict[str, Any] = {} if arguments.refine is None else {"refine": arguments.refine}
    if arguments.memory_budget is not None:
        options["memory_budget"] = byte_count(arguments.memory_budget)
    rows: list[dict[str, Any]] = []
    for name in arguments.shapes:
        shape = SHAPES[name]
        if arguments.layers is not None:
            shape = replace(shape, name=f"{shape.name}-{arguments.layers}", num_hidden_layers=arguments.layers)
        parameters = sum(rows_ * columns for _, _, _, rows_, columns in projections(shape))
        found = in_process(shape, arguments.windows, options)
        rows += rows_of(name, parameters, arguments.windows * LENGTH, found)
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
