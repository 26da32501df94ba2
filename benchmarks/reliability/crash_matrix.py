"""The crash matrix: a run of `compress` that is killed, interrupted, or finds its files or inputs changed.

    python benchmarks/reliability/crash_matrix.py [--quick] [--json FILE] [GROUP ...]

Every case ends with the bytes of an uninterrupted run, or in one line that says what to do. Runs are forks of this
process on a tiny random model (see faults.py); a few are the real command. Cases that need the superuser or a program
that is missing are left out and counted.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

import pgsvd_vllm.offline.compress  # noqa: F401
from benchmarks.reliability import crash_inputs
from benchmarks.reliability.faults import Process, Recorder, kill_self
from benchmarks.reliability.record import Row, figure, show, write
from benchmarks.reliability.run_bench import Bench

POINTS, RANDOM = 40, 20


def kills(bench: Bench) -> Iterator[Row]:
    """Kills at file operations, evenly over the run; at half of them files that were not synced lose their content."""
    bench.begin()
    events, points = _trace(bench), 4 if bench.quick else POINTS
    moments = [(number, when) for number in range(len(events)) for when in ("before", "half", "after")]
    moments = [(n, w) for n, w in moments if w != "half" or events[n].startswith("save")]
    chosen = [moments[round(i * (len(moments) - 1) / (points - 1))] for i in range(points)]
    for index, (number, when) in enumerate(chosen):
        loses = index % 2 == 1 and when != "half"
        bench.begin()
        outcome = bench.run(before=lambda n=number, w=when, cut=loses: _plant(bench, n, w, cut))  # type: ignore[misc]
        assert outcome.status == -signal.SIGKILL, f"{events[number]}: {outcome.text}"
        kind = "power cut" if loses else "kill"
        yield bench.continued(f"{kind} {when.replace('half', 'in the middle of')} {number}: {events[number]}")


def _trace(bench: Bench) -> list[str]:
    """The file operations of an uninterrupted run."""
    file = bench.work / "events"

    def plant() -> None:
        recorder = Recorder(bench.place, lambda *_: file.write_text("\n".join(recorder.events)) and None)
        recorder.install()

    outcome = bench.run(before=plant)
    assert outcome.status == 0, outcome.text
    return file.read_text().splitlines()


def _plant(bench: Bench, number: int, when: str, loses: bool) -> None:
    """Kill this process at a file operation."""

    def act(recorder: Recorder, count: int, title: str, moment: str) -> None:
        if (count, moment) != (number, when):
            return
        if when == "half":
            path = bench.place / title.partition(" ")[2]
            os.truncate(path, path.stat().st_size // 2)
        if loses:
            recorder.lose_unsynced()
        kill_self()

    Recorder(bench.place, act).install()


def random_kills(bench: Bench) -> Iterator[Row]:
    """Kills at random times, each run resumed and killed again until it ends."""
    bench.begin()
    start = time.monotonic()
    bench.run()
    whole = time.monotonic() - start
    draw = random.Random(0)
    for index in range(2 if bench.quick else RANDOM):
        bench.begin()
        for _ in range(draw.randint(1, 3)):
            process = bench.start(resume=True)
            time.sleep(draw.uniform(0, whole))
            _signal(process, signal.SIGKILL)
            outcome = process.wait()
            if outcome.status == 0:
                break
        else:
            outcome = bench.run(resume=True)
        yield bench.equal(f"random kills, draw {index}", outcome)


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def signals(bench: Bench) -> Iterator[Row]:
    """Signals while layers are calibrated, while the checkpoint is written, and after DIR has appeared."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    states: dict[str, Callable[[], bool]] = {
        "calibrating": lambda: (bench.partial / "layers/00000.safetensors").exists(),
        "writing": lambda: (bench.partial / "checkpoint").exists(),
    }
    for number in numbers[3:] if bench.quick else numbers:
        for name, reached in states.items():
            bench.begin()
            process = bench.start()
            while not reached() and not bench.output.exists():
                time.sleep(0.001)
            _signal(process, number)
            outcome = process.wait()
            row = bench.continued(f"{number.name} while {name}")
            told = outcome.status == 128 + number and "--resume" in outcome.last and "Traceback" not in outcome.text
            yield row if told or outcome.status == 0 else {**row, "value": 1, "ok": False}


def after_publishing(bench: Bench) -> Iterator[Row]:
    """A kill and an interrupt between the appearance of DIR and the end of the run."""
    for name, act in (("kill", kill_self), ("SIGINT", lambda: os.kill(os.getpid(), signal.SIGINT))):

        def plant(act: Callable[[], object] = act) -> None:
            def at_rename(_: Recorder, _count: int, title: str, moment: str) -> None:
                if title.startswith("rename out") and moment == "after" and bench.output.exists():
                    act()

            Recorder(bench.place, at_rename).install()

        bench.begin()
        outcome = bench.run(before=plant)
        if name == "SIGINT":
            row = bench.equal("SIGINT after DIR has appeared", outcome, status=130)
            yield {**row, "ok": row["ok"] and "is complete" in outcome.last and "--resume" not in outcome.last}
        else:
            yield bench.continued(f"{name} after DIR has appeared")


def concurrent(bench: Bench) -> Iterator[Row]:
    """Two processes on one DIR or one calibration folder."""
    shared = str(bench.work / "shared")
    for case, resume, options in (
        ("two fresh runs", False, ()),
        ("two runs with --resume", True, ()),
        ("two runs, one --calibration", False, ("--calibration", shared)),
    ):
        bench.begin()
        shutil.rmtree(shared, ignore_errors=True)
        if resume:
            bench.stopped()
        first = bench.start(*options, resume=resume)
        while not any(_holds(first, folder) for folder in (bench.partial, Path(shared))):
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGSTOP)
        other = ("-o", str(bench.place / "other")) if options else ()
        second = bench.start(*options, *other, resume=resume, name="second").wait()
        os.kill(first.pid, signal.SIGCONT)
        yield bench.refused(f"{case}, the second one", second, f"another run (pid {first.pid}", "since")
        yield bench.equal(f"{case}, the first one", first.wait(), *options)
        shutil.rmtree(shared, ignore_errors=True)


def _holds(process: Process, folder: Path) -> bool:
    """Whether a process has locked a folder."""
    try:
        return f'"pid": {process.pid},' in (folder / "run.lock").read_text()
    except OSError:
        return False


def real_commands(bench: Bench) -> Iterator[Row]:
    """The installed command, killed when its first layer, its factors and its checkpoint appear."""
    code = "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"
    patterns = ("layers/?????.safetensors", "factors-*/*.safetensors", "checkpoint")
    for pattern in patterns[:1] if bench.quick else patterns:
        bench.begin()
        line = [sys.executable, "-c", code, *bench.arguments()]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(bench.partial.glob(pattern)) and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        yield bench.continued(f"real command killed when {pattern} appears")


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "kills": kills,
    "random": random_kills,
    "signals": signals,
    "published": after_publishing,
    "concurrent": concurrent,
    "real": real_commands,
    **crash_inputs.GROUPS,
}


def main() -> int:
    """Run the cases, print and write the rows; the status is 0 where every row passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few cases of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.quick)
        groups = [GROUPS[name](bench) for name in arguments.groups or GROUPS]
        for group in groups:
            for row in group:
                rows.append(row)
                show([row])
    failed = sum(not row["ok"] for row in rows)
    rows += [figure("cases", len(rows)), {"case": "cases that failed", "value": failed, "bar": 0, "ok": not failed}]
    rows.append(figure("seconds of the whole matrix", round(time.monotonic() - start)))
    show(rows[-3:])
    if arguments.json:
        write(arguments.json, "python benchmarks/reliability/crash_matrix.py --json FILE", rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
