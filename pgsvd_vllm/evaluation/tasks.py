"""Scores of lm_eval's tasks, in a process of its own for each model, which frees its memory at the end.

    python -m pgsvd_vllm.evaluation.tasks JOB RESULT

JOB is a `Job` as JSON; RESULT is the file for task -> [name of the score, the score of every sample],
or for ERROR -> the reason.
"""

import codecs
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pgsvd_vllm.errors import InputError, reason_of

# Seconds to wait for the last output of a process that has ended; a child of it may still hold the pipe.
LAST_OUTPUT = 5
# Stands for a task's name in a result that is none.
ERROR = "error:"
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


@dataclass(frozen=True)
class Job:
    """What to score.

    Attributes:
        folder: of a dense or compressed model.
        tasks: names that lm_eval knows, or .jsonl files whose rows have `query`, `choices` and `gold`.
        backend: of lm_eval: `vllm`, or `hf` for transformers.
        limit: samples of each task; None for all.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        model_args: further arguments of the backend, as lm_eval writes them: KEY=VALUE,...
        trust_remote_code: run modelling code from the model's repository.
    """

    folder: str
    tasks: Sequence[str]
    backend: str
    limit: int | None = None
    device: str = "auto"
    model_args: str = ""
    trust_remote_code: bool = False


def check_tasks(tasks: Sequence[str], limit: int | None = None) -> None:
    """Refuse tasks that do not exist or cannot run; raises InputError.

    Args:
        tasks: as of `Job`.
        limit: samples of each.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    if tasks and find_spec("lm_eval") is None:
        raise InputError("--tasks: lm_eval is not installed; pip install 'pgsvd-vllm[eval]'")
    files = [Path(task) for task in tasks if task.endswith(".jsonl")]
    for file in files:
        if not file.is_file():
            raise InputError(f"--tasks {file}: no such file")
    stems = [file.stem for file in files]
    for file in files:
        if stems.count(file.stem) > 1:
            raise InputError(f"--tasks {file}: another file has the same name; rename one")
    named = [task for task in tasks if not task.endswith(".jsonl")]
    if named:
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        for task in named:
            if not manager.match_tasks([task]):
                raise InputError(f"--tasks {task}: lm_eval knows no such task; lm_eval ls tasks lists them")


def score(job: Job) -> dict[str, tuple[str, torch.Tensor]]:
    """The scores of a model: task -> name of the score, and float64 [samples].

    Raises:
        InputError: lm_eval fails.
    """
    environment = dict(os.environ)
    if job.backend == "vllm" and job.device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = job.device.removeprefix("cuda:")
    with tempfile.TemporaryDirectory() as room:
        result = Path(room) / "result.json"
        command = [sys.executable, "-m", "pgsvd_vllm.evaluation.tasks", json.dumps(asdict(job)), str(result)]
        # A group of its own: vLLM's engine is another process, which must not outlive an interruption.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            reader = threading.Thread(target=_pass_on, args=(process,), daemon=True)
            reader.start()
            status = process.wait()
            reader.join(LAST_OUTPUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        found: dict[str, Any] = {ERROR: f"status {status}"}
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
    if ERROR in found:
        raise InputError(f"--tasks {' '.join(job.tasks)}: lm_eval cannot score {job.folder} ({found[ERROR]})")
    return {task: (name, torch.tensor(values, dtype=torch.float64)) for task, (name, values) in found.items()}


def _pass_on(process: "subprocess.Popen[bytes]") -> None:
    """Print what a process prints, until it and all that share its output have ended."""
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := os.read(process.stdout.fileno(), 65536):
        sys.stderr.write(decoder.decode(data))
        sys.stderr.flush()


def _model(job: Job) -> Any:
    """lm_eval's model of a folder."""
    from lm_eval.utils import simple_parse_args_string

    from pgsvd_vllm.format.reader import read_config

    folder = Path(job.folder)
    section = read_config(folder).get("quantization_config")
    is_ours = isinstance(section, dict) and section.get("quant_method") == "pgsvd"
    given = simple_parse_args_string(job.model_args or None)
    if job.backend == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        usual = {"dtype": "auto", "load_format": "pgsvd" if is_ours else "auto", "batch_size": "auto"}
        return VLLM(pretrained=job.folder, trust_remote_code=job.trust_remote_code, **{**usual, **given})
    from lm_eval.models.huggingface import HFLM

    from pgsvd_vllm.evaluation.models import load_model
    from pgsvd_vllm.offline.data.text import load_tokenizer
    from pgsvd_vllm.offline.model.device import pick_device

    model = load_model(folder, pick_device(job.device), job.trust_remote_code)
    tokenizer = load_tokenizer(folder, job.trust_remote_code)
    return HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 16, **given})


def _run(job: Job) -> dict[str, tuple[str, list[float]]]:
    """The scores of every sample, in the order of the samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as definitions:
        names = {}
        for task in job.tasks:
            is_file = task.endswith(".jsonl")
            name = f"local_{Path(task).stem}" if is_file else task
            names[name] = Path(task).stem if is_file else task
            if is_file:
                text = DEFINITION.format(name=json.dumps(name), file=json.dumps(str(Path(task).resolve())))
                (Path(definitions) / f"{len(names)}.yaml").write_text(text, encoding="utf-8")
        results: Any = simple_evaluate(
            _model(job),
            tasks=list(names),
            task_manager=TaskManager(include_path=definitions),
            limit=job.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    found = {}
    for name, samples in results["samples"].items():
        # A sample stands once for each of the task's filters.
        own = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        key = next((key for key in SCORES if key in own[0]), None)
        if key is None:
            raise InputError(f"task {name} has none of the scores {', '.join(SCORES)} for a sample")
        ordered = sorted(own, key=lambda sample: sample["doc_id"])
        found[names.get(name, name)] = key, [float(sample[key]) for sample in ordered]
    return found


def _main() -> None:
    found: dict[str, Any]
    try:
        found = _run(Job(**json.loads(sys.argv[1])))
    except Exception as error:  # lm_eval, vLLM and transformers raise many kinds
        found = {ERROR: reason_of(error)}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
