"""Zero-shot accuracy of compressed models and the dense one, by lm_eval on local task files.

    python benchmarks/zero_shot.py --tasks DIR DENSE COMPRESSED... [--quick] [--json FILE]

DIR holds arc_easy.jsonl, boolq.jsonl and winogrande.jsonl, whose rows have a `query`, `choices` and
`gold`, the index of the right one. A choice is scored by the log-probability of its tokens after the query.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import write_rows
from pgsvd_vllm.evaluation.tasks import Job, score

TASKS = ("arc_easy", "boolq", "winogrande")
# Points of accuracy that a compressed model may lose: in one task, and in the mean, where gains hide losses.
ALLOWED = {"arc_easy": 2.0, "mean": 1.5}
QUICK_ROWS = 200


def accuracies(folder: Path, tasks: Path, rows: int | None) -> dict[str, float]:
    """Task -> accuracy in percent of the model in a folder, in transformers."""
    found = score(Job(str(folder), [str(tasks / f"{name}.jsonl") for name in TASKS], "hf", rows))
    return {name: 100 * found[name][1].mean().item() for name in TASKS}


def main() -> int:
    """Print a table of points, write JSON; the status is 0 if no model loses more than the allowed points."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path, nargs="+")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_ROWS} rows of every task")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    missing = [str(path) for name in TASKS if not (path := arguments.tasks / f"{name}.jsonl").is_file()]
    if missing:
        parser.error(f"--tasks: no {', '.join(missing)}")

    rows: list[dict[str, object]] = []
    base: dict[str, float] = {}
    for folder in (arguments.dense, *arguments.compressed):
        found = accuracies(folder, arguments.tasks, QUICK_ROWS if arguments.quick else None)
        found["mean"] = sum(found.values()) / len(found)
        print(f"{folder.name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        for case, value in found.items():
            bar = base[case] - ALLOWED[case] if base and case in ALLOWED else None
            row = {"case": f"{folder.name} {case}", "value": value, "bar": bar, "ok": bar is None or value >= bar}
            rows.append(row)
        base = base or found
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
