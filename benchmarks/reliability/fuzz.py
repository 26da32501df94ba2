"""Damaged files, read in one process: a reader refuses them with one line or finds the content they had before.

    python benchmarks/reliability/fuzz.py [--quick] [--cases N] [--seed S] [--json FILE] [--target NAME [--case I]]

Cases are shared by the targets (targets.py, row_targets.py). A case is named by seed, target and number; --case runs
one alone and shows what the reader raises. Ctrl-C ends the run with the figures so far. The exit status is 1 where a
reader raises anything but a refusal, accepts other content, takes longer than TIME_BAR or needs more memory than
MEMORY_BAR.
"""

import argparse
import contextlib
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks.reliability import record
from benchmarks.reliability.record import Row, at_most, figure
from benchmarks.reliability.row_targets import all_targets
from benchmarks.reliability.targets import Outcome, Target

CASES, QUICK_CASES = 1_000_000, 12_000
# Seconds that one case may take on a busy machine, and MiB by which it may raise the peak memory of the process.
TIME_BAR, MEMORY_BAR = 5.0, 256
# Bytes that a run may allocate beside what its imports take.
LIMIT = 4 * 2**30
# Parts of a run; each has a part of every target's cases.
STEPS = 50
# Failures shown per target.
SHOWN = 5


class HangError(BaseException):
    """A case took longer than TIME_BAR; no reader catches it."""


@dataclass
class Tally:
    """What happened to the cases of a target.

    Attributes:
        outcomes: cases by outcome.
        failures: cases whose reader raised no refusal, as (number, exception).
        slowest: seconds of the slowest case.
        memory: MiB by which one case raised the peak memory at most.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    failures: list[tuple[int, BaseException]] = field(default_factory=list)
    different: list[int] = field(default_factory=list)
    slowest: float = 0.0
    memory: float = 0.0


def damaged(target: Target, seed: int, number: int) -> bytes:
    """The file of one case."""
    return target.damage(target.sample, Random(f"{seed}:{target.name}:{number}"))


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise HangError in the block after some seconds."""

    def stop(*_: object) -> None:
        raise HangError(f"still running after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def peak_memory() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_memory() -> None:
    """Let this process allocate LIMIT more at most: an input that takes all memory fails instead of the machine."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, resource.RLIM_INFINITY))


def run_case(target: Target, seed: int, number: int, tally: Tally) -> None:
    """Run one case and count what happens."""
    data = damaged(target, seed, number)
    memory, begin = peak_memory(), time.perf_counter()
    try:
        with limited(TIME_BAR):
            outcome = target.read(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of compiled code is no Exception
        tally.failures.append((number, error))
    else:
        tally.outcomes[outcome] += 1
        if outcome is Outcome.DIFFERENT:
            tally.different.append(number)
    tally.slowest = max(tally.slowest, time.perf_counter() - begin)
    tally.memory = max(tally.memory, peak_memory() - memory)


def show_failures(target: Target, seed: int, tally: Tally) -> None:
    """Print the first failures of each kind, and the command that repeats them."""
    kinds: dict[tuple[str, str, int | None], int] = {}
    for number, error in tally.failures:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kinds.setdefault((type(error).__name__, last.filename, last.lineno), number)
    for (name, file, line), number in list(kinds.items())[:SHOWN]:
        print(f"  {name} at {file}:{line}: --seed {seed} --target {target.name!r} --case {number}")
    for number in tally.different[:SHOWN]:
        print(f"  other content: --seed {seed} --target {target.name!r} --case {number}")


def rows_of(tallies: dict[str, Tally], seconds: float) -> list[Row]:
    """The figures of a run."""
    total = Counter[Outcome]()
    for tally in tallies.values():
        total += tally.outcomes
    failures = sum(len(tally.failures) for tally in tallies.values())
    rows = [
        figure("inputs", total.total() + failures),
        figure("inputs refused with one line", total[Outcome.REFUSED]),
        figure("checkpoints accepted with the same content", total[Outcome.EQUAL]),
        figure("calibration inputs and latency tables accepted, which have no checksum", total[Outcome.READ]),
        at_most("inputs accepted with other content", total[Outcome.DIFFERENT], 0),
        at_most("other exceptions, and unreadable messages", failures, 0),
        at_most("slowest input, seconds", round(max(tally.slowest for tally in tallies.values()), 3), TIME_BAR),
        at_most("memory of one input, MiB", round(max(tally.memory for tally in tallies.values()), 1), MEMORY_BAR),
        figure("seconds in all", round(seconds)),
    ]
    for name, tally in tallies.items():
        count = tally.outcomes.total() + len(tally.failures)
        rows.append(figure(f"inputs: {name}", count))
        rows.append(figure(f"refused: {name}", tally.outcomes[Outcome.REFUSED]))
    return rows


def run(targets: Sequence[Target], cases: int, seed: int) -> dict[str, Tally]:
    """Run cases of every target in turn, until all are done or Ctrl-C."""
    tallies = {target.name: Tally() for target in targets}
    whole = sum(target.share for target in targets)
    counts = {target.name: round(cases * target.share / whole) for target in targets}
    begin = time.monotonic()
    try:
        for step in range(STEPS):
            for target in targets:
                count = counts[target.name]
                for number in range(count * step // STEPS, count * (step + 1) // STEPS):
                    run_case(target, seed, number, tallies[target.name])
            failures = sum(len(tally.failures) + len(tally.different) for tally in tallies.values())
            seconds = time.monotonic() - begin
            print(f"{(step + 1) / STEPS:.0%}, {seconds:.0f} s, {failures} failures", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return tallies


def main() -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help="of all targets together")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", metavar="NAME", help="one target alone")
    parser.add_argument("--case", type=int, metavar="I", help="one case of the target alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        targets = [t for t in all_targets(Path(folder)) if arguments.target in (None, t.name)]
        if not targets:
            parser.error(f"no target {arguments.target!r}")
        if arguments.case is not None:
            data = damaged(targets[0], arguments.seed, arguments.case)
            print(data)
            print(targets[0].read(data).value)
            return 0
        limit_memory()
        begin = time.monotonic()
        tallies = run(targets, QUICK_CASES if arguments.quick else arguments.cases, arguments.seed)
        for target in targets:
            show_failures(target, arguments.seed, tallies[target.name])
    rows = rows_of(tallies, time.monotonic() - begin)
    record.show(rows)
    if arguments.json:
        command = f"python benchmarks/reliability/fuzz.py --cases {arguments.cases} --seed {arguments.seed}"
        record.write(arguments.json, command, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
