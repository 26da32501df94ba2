"""Scores of lm_eval's tasks, in a process of its own for each model, which frees its memory at the end.

    python -m pgsvd_vllm.evaluation.tasks JOB RESULT

JOB is the JSON of `score`'s arguments; RESULT is the file for task -> [name of the score, the score of every sample],
or for `error` -> the reason.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pgsvd_vllm.errors import InputError, reason_of

# File number of standard error, where lm_eval's progress goes.
STDERR = 2
# Scores of a sample, the first that it has.
SCORES = ("acc", "exact_match")
# A task whose rows have a query, choices and the index of the right one (`gold`).
DEFINITION = """task: {name}
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


def score(folder: Path, tasks: Sequence[str], backend: str, limit: int | None) -> dict[str, tuple[str, torch.Tensor]]:
    """The scores of a model: task -> name of the score, and float64 [samples].

    Args:
        folder: of a dense or compressed model.
        tasks: names that lm_eval knows, or .jsonl files whose rows have `query`, `choices` and `gold`.
        backend: of lm_eval: `vllm`, or `hf` for transformers.
        limit: samples of each task; None for all.

    Raises:
        InputError: a file does not exist, or lm_eval fails.
    """
    for task in tasks:
        if task.endswith(".jsonl") and not Path(task).is_file():
            raise InputError(f"--tasks {task}: no such file")
    with tempfile.TemporaryDirectory() as room:
        result = Path(room) / "result.json"
        job = {"folder": str(folder), "tasks": list(tasks), "backend": backend, "limit": limit}
        command = [sys.executable, "-m", "pgsvd_vllm.evaluation.tasks", json.dumps(job), str(result)]
        status = subprocess.run(command, stdout=STDERR).returncode
        found: dict[str, Any] = {"error": f"status {status}"}
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise InputError(f"--tasks {' '.join(tasks)}: lm_eval cannot score {folder} ({found['error']})")
    return {task: (name, torch.tensor(values, dtype=torch.float64)) for task, (name, values) in found.items()}


def _model(folder: Path, backend: str) -> Any:
    """lm_eval's model of a folder."""
    from pgsvd_vllm.format.reader import read_config

    is_ours = read_config(folder).get("quantization_config", {}).get("quant_method") == "pgsvd"
    if backend == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=str(folder), dtype="auto", load_format="pgsvd" if is_ours else "auto", batch_size="auto")
    from lm_eval.models.huggingface import HFLM

    from pgsvd_vllm.evaluation.models import load_model
    from pgsvd_vllm.offline.data.text import load_tokenizer
    from pgsvd_vllm.offline.model.device import pick_device

    model = load_model(folder, pick_device("auto"), trust_remote_code=False)
    return HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=16, max_length=2048)


def _run(folder: Path, tasks: Sequence[str], backend: str, limit: int | None) -> dict[str, tuple[str, list[float]]]:
    """The scores of every sample, in the order of the samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as definitions:
        names = {}
        for task in tasks:
            name = f"local_{Path(task).stem}" if task.endswith(".jsonl") else task
            names[name] = Path(task).stem if task.endswith(".jsonl") else task
            if name != task:
                text = DEFINITION.format(name=name, file=Path(task).resolve())
                (Path(definitions) / f"{name}.yaml").write_text(text, encoding="utf-8")
        results: Any = simple_evaluate(
            _model(folder, backend),
            tasks=list(names),
            task_manager=TaskManager(include_path=definitions),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    found = {}
    for name, samples in results["samples"].items():
        key = next((key for key in SCORES if key in samples[0]), None)
        if key is None:
            raise InputError(f"task {name}: has none of the scores {', '.join(SCORES)} for a sample")
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        found[names.get(name, name)] = key, [float(sample[key]) for sample in ordered]
    return found


def _main() -> None:
    job = json.loads(sys.argv[1])
    found: dict[str, Any]
    try:
        found = _run(Path(job["folder"]), job["tasks"], job["backend"], job["limit"])
    except Exception as error:  # lm_eval, vLLM and transformers raise many kinds
        found = {"error": reason_of(error)}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
