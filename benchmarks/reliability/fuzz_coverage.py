"""Coverage-guided fuzzing of the readers with atheris, one process per target.

    python benchmarks/reliability/fuzz_coverage.py [--seconds S] [--target NAME]

`make fuzz` installs atheris and runs it. Inputs that reach new code are kept in .cache/fuzz and are the start of the
next run; an input that a reader does not refuse with one line is kept beside them as crash-*. The mutations are those
of mutations.py and atheris's own, in turn.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import atheris  # noqa: E402

with atheris.instrument_imports(include=["pgsvd_vllm", "json"]):
    from benchmarks.reliability.row_targets import all_targets
    from benchmarks.reliability.targets import Outcome, Target

CORPUS = ROOT / ".cache" / "fuzz"
# Longest input in bytes, seconds of one input, and memory of the process in MiB: libFuzzer's limits.
MAX_LENGTH, TIMEOUT, MEMORY = 65_536, 10, 4_096


def fuzz(target: Target, seconds: int) -> None:
    """Fuzz one target until the time is over; libFuzzer ends the process."""
    corpus = CORPUS / target.name.replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "sample").write_bytes(target.sample)

    def read(data: bytes) -> None:
        if target.read(data) is Outcome.DIFFERENT:
            raise AssertionError("accepted with other content")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        try:
            return target.damage(data, Random(seed))[:max_size]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return target.damage(target.sample, Random(seed))[:max_size]  # `data` is damaged already

    limits = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={MEMORY}"]
    limits += [f"-max_len={MAX_LENGTH}", f"-artifact_prefix={corpus}/", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzz one target, or every target in a process of its own; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, metavar="S", help="for each target")
    parser.add_argument("--target", metavar="NAME", help="one target alone, in this process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        targets = {target.name: target for target in all_targets(Path(folder))}
        if arguments.target is not None:
            fuzz(targets[arguments.target], arguments.seconds)
        failed = []
        for name in targets:
            print(f"== {name}, {arguments.seconds} s", flush=True)
            command = [sys.executable, __file__, "--seconds", str(arguments.seconds), "--target", name]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
    print(f"failed: {', '.join(failed)}; see {CORPUS}" if failed else f"{len(targets)} targets, no failure")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
