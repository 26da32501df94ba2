"""A tiny model, a text, and runs of `compress` on them, for the crash matrix."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.reliability.faults import Outcome, Process, contents, differing, empty, kill_self
from benchmarks.reliability.record import Row, at_most
from pgsvd_vllm.cli import compress as cli
from tests.conftest import save_tiny_model

# What a refusal counts as that leaves files behind which it must not touch, or is no single line.
WRONG = 1000
NOTHING = tuple[str, ...]()


class Bench:
    """Runs of one model.

    Args:
        work: an empty folder.
        quick: whether few cases of each kind run.

    Attributes:
        model: a tiny random Llama of two layers.
        text: of the calibration.
        place: folder of the current case; `out` in it is DIR.
    """

    def __init__(self, work: Path, quick: bool = False) -> None:
        self.work, self.quick = work, quick
        self.model = save_tiny_model(work / "model", layers=2, tie=False)
        self.text = work / "text.txt"
        self.text.write_text("".join(f"{n} times {n + 1} is {n * (n + 1)}, and so on.\n" for n in range(900)))
        self.place = work / "case"
        self._references: dict[tuple[str, ...], dict[str, str]] = {}

    @property
    def output(self) -> Path:
        """DIR of the current case."""
        return self.place / "out"

    @property
    def partial(self) -> Path:
        """DIR.partial of the current case."""
        return self.place / "out.partial"

    def begin(self) -> None:
        """Start a case in an empty folder."""
        empty(self.place)
        self.place.mkdir()

    def arguments(self, options: Sequence[str] = NOTHING) -> list[str]:
        """The command line of a run."""
        given = ["--ratio", "0.3", "--include", "lm_head", "--num-calibration-samples", "16", "--max-seq-length", "64"]
        return ["compress", str(self.model), "-o", str(self.output), "--dataset", str(self.text), *given, *options]

    def start(
        self,
        *options: str,
        before: Callable[[], object] = lambda: None,
        resume: bool = False,
        name: str = "log",
    ) -> Process:
        """Start a run; checkpoints quote its command without --resume.

        Args:
            options: besides the usual ones, which they override.
            before: called in the process of the run.
            resume: whether the run continues an earlier one.
            name: of the file for its output.
        """
        shown = self.arguments(options)
        return Process([*shown, *(["--resume"] if resume else [])], self.work / name, before, shown)

    def run(self, *options: str, before: Callable[[], object] = lambda: None, resume: bool = False) -> Outcome:
        """Run to the end."""
        return self.start(*options, before=before, resume=resume).wait()

    def reference(self, *options: str) -> dict[str, str]:
        """The files of an uninterrupted run with these options."""
        if options not in self._references:
            kept = self.work / "kept"
            if self.place.exists():
                self.place.rename(kept)
            self.begin()
            outcome = self.run(*options)
            assert outcome.status == 0, outcome.text
            self._references[options] = contents(self.output)
            empty(self.place)
            if kept.exists():
                kept.rename(self.place)
        return self._references[options]

    def stopped(self, *options: str, at: str = "ranks by") -> None:
        """Leave DIR.partial as a run does that is killed when it says a line."""

        def plant() -> None:
            say = cli._say

            def ended(line: str) -> None:
                say(line)
                if line.startswith(at):
                    kill_self()

            cli._say = ended

        outcome = self.run(*options, before=plant)
        assert outcome.status == -9, outcome.text

    def continued(self, case: str, *options: str, before: Callable[[], object] = lambda: None) -> Row:
        """The row of a case whose run is resumed now and must give the files of an uninterrupted one."""
        return self.equal(case, self.run(*options, before=before, resume=True), *options)

    def equal(self, case: str, outcome: Outcome, *options: str, status: int = 0) -> Row:
        """The row of a case whose run has ended with a status: files that differ from an uninterrupted run.

        A run that was killed after its last file operation is complete, so that the next one has nothing to resume.
        """
        is_complete = outcome.is_refusal and "nothing is left to resume" in outcome.last
        ended = outcome.status == status or is_complete
        wrong = differing(self.output, self.reference(*options)) if ended else WRONG
        wrong += self.partial.exists() and "cannot be deleted" not in outcome.text
        wrong += "Traceback" in outcome.text
        return self._row(f"{case}: files that differ from an uninterrupted run", wrong, outcome)

    def refused(self, case: str, outcome: Outcome, *words: str) -> Row:
        """The row of a case whose run must have ended in one line, which holds some words, without DIR."""
        wrong = 0 if outcome.is_refusal and all(word in outcome.last for word in words) else WRONG
        wrong += self.output.exists()
        return self._row(f"{case}: refused in one line; deviations", wrong, outcome)

    def _row(self, case: str, wrong: int, outcome: Outcome) -> Row:
        if wrong:
            print(f"--- {case}: status {outcome.status}\n{outcome.text[-3000:]}\n---", flush=True)
        return at_most(case, wrong, 0)

    def copy(self, name: str) -> Path:
        """A copy of the current case's folder, to begin several cases from one state."""
        kept = self.work / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.place, kept, symlinks=True)
        return kept

    def restore(self, kept: Path) -> None:
        """Begin a case from a copy."""
        empty(self.place)
        shutil.copytree(kept, self.place, symlinks=True)
