"""Zero-shot accuracy of a small CLIP, compressed by one tolerance a tower, by one for both, and by measured losses.

    python benchmarks/clip_accuracy.py [--quick] [--json FILE] [--markdown FILE] [--plot FILE]

The model is that of small_clip.py. At every size the two tolerances are those that predict the smallest loss, among
all pairs of them of that size (PGSVD, arXiv 2510.05544, section 4.3: a tolerance for each tower); the loss is measured
by gradients on the calibration pairs, not on the images that are tested with.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForZeroShotImageClassification as CLIP

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.small_clip import PHOTOGRAPHS, Pictures, accuracy, load_pictures, save_pairs, small_clip
from pgsvd_vllm.offline.allocate import at_tolerance
from pgsvd_vllm.offline.calibrate_pass import loss_energies, output_energies
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.pairs import load_processor
from pgsvd_vllm.offline.plan import CompressOptions, Plan, make_plan
from pgsvd_vllm.offline.spectrum import error_profile, tail_energy
from pgsvd_vllm.offline.workspace import Workspace

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
STEPS = 40


@dataclass(frozen=True)
class Energies:
    """What is known of a plan's projections.

    Attributes:
        profiles: projection -> relative error of every rank.
        tails: projection -> predicted loss of every rank, nats for each image and text.
    """

    plan: Plan
    profiles: dict[str, Any]
    tails: dict[str, Any]

    def tower(self, name: str) -> list[Any]:
        """A tower's projections."""
        return [p for p in self.plan.flat if p.tower == name]

    def at(self, tower: str, tolerance: float) -> tuple[float, float]:
        """Numbers that a tower's tolerance removes, and the predicted loss."""
        projections = self.tower(tower)
        found = at_tolerance(projections, self.profiles, tolerance, form=self.plan.form)
        loss = sum(float(self.tails[name][rank]) for name, rank in found.ranks.items())
        return found.removed * sum(p.numel for p in projections), loss

    def removing(self, tower: str, numbers: float) -> float | None:
        """The tolerance with which a tower removes so many numbers; None where none does."""
        low, high = 0.0, 1.0
        if self.at(tower, high)[0] < numbers:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(tower, middle)[0] < numbers else (low, middle)
        return high


def energies_of(options: CompressOptions) -> Energies:
    """Reads what calibration has kept."""
    plan = make_plan(replace(options, sensitivity="measured", form="factors"))
    workspace = Workspace(plan)
    profiles = {name: error_profile(values) for name, values in output_energies(plan, workspace).items()}
    tails = {name: 0.5 * tail_energy(values) for name, values in loss_energies(plan, workspace).items()}
    workspace.discard()
    return Energies(plan, profiles, tails)


def best_tolerances(known: Energies, ratio: float) -> dict[str, float]:
    """The tolerance of each tower, of all pairs that remove the ratio those with the smallest predicted loss."""
    wanted = ratio * sum(p.numel for p in known.plan.flat)
    found = []
    for step in range(1, STEPS):
        vision = (step / STEPS) ** 2
        removed, loss = known.at("vision", vision)
        language = known.removing("language", wanted - removed) if removed < wanted else None
        if language is not None:
            found.append((loss + known.at("language", language)[1], {"vision": vision, "language": language}))
    return min(found, key=lambda entry: entry[0])[1]


def shared_tolerance(known: Energies, ratio: float) -> float:
    """The tolerance of both towers that removes the ratio."""
    wanted, low, high = ratio * sum(p.numel for p in known.plan.flat), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        removed = sum(known.at(tower, middle)[0] for tower in known.plan.towers)
        low, high = (middle, high) if removed < wanted else (low, middle)
    return high


def cases(known: Energies, ratio: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of every way to that size."""
    yield "one tolerance for both towers", {"tolerance": shared_tolerance(known, ratio)}
    yield "one tolerance a tower", {"tolerance": best_tolerances(known, ratio)}
    yield "the same share of each tower", {"sensitivity": "uniform", "ratio": ratio}
    yield "measured losses (default)", {"ratio": ratio}


def measure(ratios: tuple[float, ...], tested: Pictures, work: Path, trained: Pictures) -> list[dict[str, Any]]:
    """One row a case: accuracy, and what was removed."""
    folder = small_clip(PHOTOGRAPHS)
    processor = load_processor(folder)
    options = CompressOptions(
        str(folder), work / "out", dataset=(str(save_pairs(work / "pairs", trained)),), calibration=work / "calibration"
    )
    compress(options)
    shutil.rmtree(options.output)
    known = energies_of(options)
    dense = accuracy(CLIP.from_pretrained(folder).eval(), processor, tested)
    rows = [{"case": "dense", "value": dense["all"], "bar": None, "ok": True, "removed": 0.0, **dense}]
    for ratio in ratios:
        found: dict[str, float] = {}
        for name, chosen in cases(known, ratio):
            result = compress(replace(options, **chosen))
            by_kind = accuracy(CLIP.from_pretrained(result.output).eval(), processor, tested)
            found[name] = by_kind["all"]
            bar = found["one tolerance for both towers"] if name == "one tolerance a tower" else None
            row = {"case": f"{name}, {ratio:.0%}", "value": by_kind["all"], "bar": bar}
            row |= {"ok": bar is None or by_kind["all"] >= bar, "removed": result.allocation.removed, **by_kind}
            row |= {"tolerances": result.allocation.tolerances}
            print(f"{row['case']:48} {row['removed']:.1%} removed, accuracy {row['value']:.3f}", flush=True)
            rows.append(row)
            shutil.rmtree(result.output)
    return rows


def markdown(rows: list[dict[str, Any]], ratios: tuple[float, ...]) -> str:
    """A line a case, a column a size."""
    lines = ["| | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    names = dict.fromkeys(row["case"].rpartition(", ")[0] for row in rows[1:])
    for name in names:
        values = [row["value"] for row in rows if row["case"].rpartition(", ")[0] == name]
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return f"dense {100 * rows[0]['value']:.1f}\n\n" + "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy by removed share."""
    from matplotlib import pyplot

    pyplot.figure(figsize=(6, 4))
    for name in dict.fromkeys(row["case"].rpartition(", ")[0] for row in rows[1:]):
        own = [row for row in rows if row["case"].rpartition(", ")[0] == name]
        pyplot.plot([100 * row["removed"] for row in own], [100 * row["value"] for row in own], marker="o", label=name)
    pyplot.axhline(100 * rows[0]["value"], color="grey", linestyle=":", label="dense")
    pyplot.xlabel("projections' parameters removed (%)")
    pyplot.ylabel("zero-shot accuracy (%)")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=120)


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only 20 and 40 %%")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    ratios = (0.2, 0.4) if arguments.quick else RATIOS
    trained, tested = load_pictures(PHOTOGRAPHS)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(ratios, tested, Path(work), trained)
    text = markdown(rows, ratios)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
