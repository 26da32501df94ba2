"""Zero-shot accuracy of compressed models and the dense one, by lm_eval on local task files.

    python benchmarks/zero_shot.py --tasks DIR DENSE COMPRESSED... [--quick] [--json FILE]

DIR holds arc_easy.jsonl, boolq.jsonl and winogrande.jsonl, whose rows have a `query`, `choices` and
`gold`, the index of the right one. A choice is scored by the log-probability of its tokens after the query.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pgsvd_vllm.evaluation.models import load_model
from pgsvd_vllm.offline.data.text import load_tokenizer

TASKS = ("arc_easy", "boolq", "winogrande")
# Points of accuracy that a compressed model may lose: in one task, and in the mean, where gains hide losses.
ALLOWED = {"arc_easy": 2.0, "mean": 1.5}
QUICK_ROWS = 200

DEFINITION = """task: local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def accuracies(folder: Path, definitions: Path, rows: int | None) -> dict[str, float]:
    """Task -> accuracy in percent of the model in a folder, in float32 where its dtype would be emulated."""
    model = load_model(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"), trust_remote_code=False)
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=16, max_length=2048),
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        limit=rows,
        bootstrap_iters=0,
    )
    return {name: 100 * results["results"][f"local_{name}"]["acc,none"] for name in TASKS}


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
    with tempfile.TemporaryDirectory() as name:
        definitions = Path(name)
        for task in TASKS:
            file = (arguments.tasks / f"{task}.jsonl").resolve()
            (definitions / f"{task}.yaml").write_text(DEFINITION.format(name=task, file=file), encoding="utf-8")
        for folder in (arguments.dense, *arguments.compressed):
            found = accuracies(folder, definitions, QUICK_ROWS if arguments.quick else None)
            found["mean"] = sum(found.values()) / len(found)
            print(f"{folder.name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
            for case, value in found.items():
                bar = base[case] - ALLOWED[case] if base and case in ALLOWED else None
                row = {"case": f"{folder.name} {case}", "value": value, "bar": bar, "ok": bar is None or value >= bar}
                rows.append(row)
            base = base or found
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
