"""Zero-shot accuracy of a small CLIP, compressed by one tolerance per tower, one for both, and measured losses.

    python benchmarks/clip_accuracy.py [--images ZIP] [--quick] [--json FILE] [--markdown FILE] [--plot FILE]

The model is that of small_clip.py. At every size a search tries pairs of tolerances for the two towers (PGSVD, arXiv
2510.05544) and takes the pair with the least KL divergence of class probabilities from the dense model on calibration
images. Divergence and accuracy on other images evaluate the result.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from transformers import AutoModelForZeroShotImageClassification as CLIP

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.rows import write_rows
from benchmarks.small_clip import Pictures, accuracy, class_logits, load_pictures, save_pairs, small_clip
from pgsvd_vllm.offline.calibration.collect import output_energies
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.image_text import load_processor
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.uniform import at_tolerance

RATIOS = (0.2, 0.4, 0.6, 0.8, 0.9)
# First tolerances of the vision tower, as factors of the shared tolerance of that size.
FACTORS = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.9)
# Times that the gaps beside the best so far are halved.
HALVINGS = 3
# Calibration images that choose between them.
CHOOSING = 400
SHARED, OWN = "one tolerance for both towers", "one tolerance a tower"


@dataclass(frozen=True)
class Energies:
    """Error profiles of a plan's projections.

    Attributes:
        profiles: projection -> relative error of every rank.
    """

    plan: Plan
    profiles: dict[str, Any]

    def tower(self, name: str) -> list[Any]:
        """A tower's projections."""
        return [p for p in self.plan.projections.flat if p.tower == name]

    def removed(self, tower: str, tolerance: float) -> float:
        """Parameters that a tower's tolerance removes."""
        projections = self.tower(tower)
        found = at_tolerance(projections, self.profiles, tolerance, storage=self.plan.settings.storages[0])
        return found.removed * sum(p.numel for p in projections)

    def removing(self, tower: str, numbers: float) -> float | None:
        """The tolerance with which a tower removes so many parameters; None if none does."""
        low, high = 0.0, 1.0
        if self.removed(tower, high) < numbers:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.removed(tower, middle) < numbers else (low, middle)
        return high


def energies_of(options: CompressOptions) -> Energies:
    """Reads the stored calibration."""
    plan = make_plan(replace(options, sensitivity="measured", form="factors"))
    state = open_state(plan)
    energies = output_energies(state, len(plan.projections.layers))
    profiles = {name: error_profile(values) for name, values in energies.items()}
    state.discard()
    return Energies(plan, profiles)


def own_tolerances(known: Energies, ratio: float, evaluator: "Evaluator") -> dict[str, float]:
    """The pair of least divergence: a tolerance of the vision tower, and the text tower's tolerance for the rest."""
    wanted, middle = ratio * sum(p.numel for p in known.plan.projections.flat), shared_tolerance(known, ratio)
    tried: dict[float, tuple[float, dict[str, float]]] = {}  # factor -> loss, pair
    factors: Sequence[float] = FACTORS
    for _ in range(1 + HALVINGS):
        for factor in factors:
            vision = min(factor * middle, 0.999)
            rest = wanted - known.removed("vision", vision)
            language = known.removing("language", rest) if rest > 0 else None
            if language is not None:
                pair = {"vision": vision, "language": language}
                tried[factor] = evaluator.compressed({"tolerance": pair})[0], pair
        best = min(tried, key=lambda factor: tried[factor][0])
        ordered = sorted(tried)
        place = ordered.index(best)
        factors = [(best * other) ** 0.5 for other in ordered[max(0, place - 1) : place + 2] if other != best]
    return tried[best][1]


def shared_tolerance(known: Energies, ratio: float) -> float:
    """The tolerance of both towers that removes the ratio."""
    wanted, low, high = ratio * sum(p.numel for p in known.plan.projections.flat), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        removed = sum(known.removed(tower, middle) for tower in known.plan.projections.towers)
        low, high = (middle, high) if removed < wanted else (low, middle)
    return high


def cases(known: Energies, ratio: float, chosen: dict[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of every method at that size; `chosen` are the tolerances of the towers."""
    yield SHARED, {"tolerance": shared_tolerance(known, ratio)}
    yield OWN, {"tolerance": chosen}
    yield "the same share of each tower", {"sensitivity": "uniform", "ratio": ratio}
    yield "measured losses (default)", {"ratio": ratio}


class Evaluator:
    """How far compressed models are from the dense one, on some pictures.

    Args:
        folder: of the dense model.
        options: of its compression.
        pictures: evaluated.
    """

    def __init__(self, folder: Path, options: CompressOptions, pictures: Pictures) -> None:
        self.processor, self.options, self.pictures = load_processor(folder), options, pictures
        self.dense = self.logits(folder)

    def logits(self, folder: Path) -> torch.Tensor:
        """A model's class logits of the pictures."""
        return class_logits(CLIP.from_pretrained(folder).eval(), self.processor, self.pictures)

    def compressed(self, chosen: dict[str, Any]) -> tuple[float, torch.Tensor, Allocation]:
        """For a choice of options: nats from the dense model, class logits, and ranks."""
        result = compress(replace(self.options, **chosen))
        logits = self.logits(result.output)
        shutil.rmtree(result.output)
        gap = F.kl_div(logits.log_softmax(-1), self.dense.log_softmax(-1), reduction="batchmean", log_target=True)
        return float(gap), logits, result.choice.allocation


def measure(
    ratios: tuple[float, ...], folder: Path, tested: Pictures, trained: Pictures, work: Path
) -> list[dict[str, Any]]:
    """One row per case: accuracy and removed share."""
    options = CompressOptions(
        str(folder), work / "out", dataset=(str(save_pairs(work / "pairs", trained)),), calibration=work / "calibration"
    )
    compress(options)
    shutil.rmtree(options.output)
    known = energies_of(options)
    some = torch.randperm(len(trained.pixels), generator=torch.Generator().manual_seed(0))[:CHOOSING]
    final, choosing = Evaluator(folder, options, tested), Evaluator(folder, options, trained.part(some))
    by_kind = accuracy(final.dense, tested)
    rows = [{"case": "dense", "value": by_kind["all"], "bar": None, "ok": True, "removed": 0.0, **by_kind}]
    for ratio in ratios:
        chosen = own_tolerances(known, ratio, choosing)
        found: dict[str, float] = {}
        for name, case in cases(known, ratio, chosen):
            found[name], logits, allocation = final.compressed(case)
            bar = found[SHARED] if name == OWN else None
            row = {"case": f"{name}, {ratio:.0%}", "value": found[name], "bar": bar}
            row |= {"ok": bar is None or found[name] <= bar, "removed": allocation.removed}
            row |= {"tolerances": allocation.tolerances, **accuracy(logits, tested)}
            print(f"{row['case']:48} {row['removed']:.1%}: {row['value']:.4f} nats, {row['all']:.1%}", flush=True)
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], ratios: tuple[float, ...]) -> str:
    """A line per case, a column per size: accuracy, and nats from the dense model's class probabilities."""
    lines = ["| | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    names = dict.fromkeys(row["case"].rpartition(", ")[0] for row in rows[1:])
    for name in names:
        own = [row for row in rows if row["case"].rpartition(", ")[0] == name]
        lines.append(f"| {name} | " + " | ".join(f"{100 * row['all']:.1f} ({row['value']:.3f})" for row in own) + " |")
    return f"dense {100 * rows[0]['all']:.1f}\n\n" + "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Divergence and accuracy by removed share."""
    from matplotlib import pyplot

    _, (above, below) = pyplot.subplots(2, 1, figsize=(6, 7), sharex=True)
    for name in dict.fromkeys(row["case"].rpartition(", ")[0] for row in rows[1:]):
        own = [row for row in rows if row["case"].rpartition(", ")[0] == name]
        removed = [100 * row["removed"] for row in own]
        above.semilogy(removed, [row["value"] for row in own], marker="o", label=name)
        below.plot(removed, [100 * row["all"] for row in own], marker="o")
    below.axhline(100 * rows[0]["all"], color="grey", linestyle=":")
    above.set_ylabel("from the dense model (nats)")
    below.set_ylabel("zero-shot accuracy (%)")
    below.set_xlabel("projections' parameters removed (%)")
    above.legend()
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=120)


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="ZIP", help="photographs beside the digits, with a labels.json")
    parser.add_argument("--quick", action="store_true", help="only 20 and 40 %%")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    ratios = (0.2, 0.4) if arguments.quick else RATIOS
    folder = small_clip(arguments.images)
    trained, tested = load_pictures(arguments.images)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(ratios, folder, tested, trained, Path(work))
    text = markdown(rows, ratios)
    print(text)
    write_rows(arguments.json, rows)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
