"""Compare a compressed model with its base: perplexity, tasks, answers; status 3 if too little is kept.

Both models are measured on the same samples in one run.
"""

import argparse
import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.cli.model_arguments import add_model, add_text_column
from pgsvd_vllm.errors import InputError, reason_of

if TYPE_CHECKING:
    from pgsvd_vllm.evaluation.recovery import Row

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
)
ANSWER_TOKENS = 60
LEAST_WINDOWS = 2
TOO_LITTLE_KEPT = 3
LABELS = ("compressed", "base")

EXAMPLES = (
    "evaluate DIR --against MODEL --dataset text.txt",
    "evaluate DIR --against MODEL --tasks arc_easy winogrande --min-recovery 0.97 --json result.json",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_model(parser, "DIR", "compressed (or any) model: local folder or Hugging Face id")
    parser.add_argument("--against", metavar="BASE", help="the dense model, a folder or id, measured in the same run")
    parser.add_argument(
        "--dataset",
        metavar="NAME|FILE|FOLDER",
        help="text for perplexity, in the formats of compress --dataset (default: docstrings of Python's standard "
        "library, which python-docs does not contain); take text that calibration has not seen, such as "
        "Salesforce/wikitext:wikitext-2-raw-v1:test (without a third part it is the split train)",
    )
    add_text_column(parser)
    parser.add_argument(
        "--num-samples",
        type=int,
        default=32,
        metavar="N",
        help="windows at equal distances over the text, each behind the tokens that the tokenizer puts in front of a "
        "text, such as BOS (default 32; 0: no perplexity)",
    )
    parser.add_argument(
        "--max-seq-length", type=int, default=1024, metavar="L", help="tokens per window (default 1024)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="names of lm_eval's tasks, or .jsonl files whose rows have a query, choices, and gold, the index of the "
        "right choice (needs pip install 'pgsvd-vllm[eval]')",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples of every task alone")
    parser.add_argument(
        "--backend",
        choices=["vllm", "hf"],
        help="what runs the tasks: vLLM (default where it is installed) or transformers",
    )
    parser.add_argument(
        "--model-args",
        default="",
        metavar="KEY=VALUE,...",
        help="further arguments of lm_eval's backend, such as tensor_parallel_size=2,max_model_len=4096",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt that the models answer greedily, side by side; repeat the option (default: three prompts)",
    )
    parser.add_argument("--no-answers", action="store_true", help="ask no prompts")
    parser.add_argument(
        "--min-recovery",
        type=float,
        metavar="R",
        help="end with status 3 if a measurement keeps less than this share of the base's quality, such as 0.97: of "
        "its score, or of the inverse of its perplexity; every task of a group is a measurement",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if available)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements and the answers")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit status and raises PgsvdError."""
    _check(arguments)
    from pgsvd_vllm.evaluation.recovery import table
    from pgsvd_vllm.offline.model.hub import resolve_folder

    folders = [resolve_folder(arguments.model, arguments.trust_remote_code, arguments.revision)]
    if arguments.against is not None:
        try:
            folders.append(resolve_folder(arguments.against, arguments.trust_remote_code))
        except InputError as error:
            raise InputError(str(error).replace("MODEL", "--against", 1)) from None
    prompts = [] if arguments.no_answers else list(arguments.prompt or PROMPTS)
    rows, answers = _texts(arguments, folders, prompts)
    if rows:
        print("\n".join(table(rows)))
    for number, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for label, given in zip(LABELS, answers, strict=False):
            print(f"  {label:10}  " + given[number].replace("\n", "\n              "))
    spoken = [
        {"prompt": prompt, **{label: given[n] for label, given in zip(LABELS, answers, strict=False)}}
        for n, prompt in enumerate(prompts)
    ]
    _write(arguments, rows, spoken)
    scores = _tasks(arguments, folders)
    if scores:
        print("\n".join(table(scores)))
        rows += scores
        _write(arguments, rows, spoken)
    poor = [row for row in rows if not _is_ok(row, arguments.min_recovery)]
    for row in poor:
        reason = "not a finite number"
        if row.is_finite:
            reason = f"{row.recovery:.1%} kept, {arguments.min_recovery:.1%} required"
        print(f"{row.name}, {row.unit}: {reason}")
    return TOO_LITTLE_KEPT if poor else 0


def _is_ok(row: "Row", least: float | None) -> bool:
    """Whether a measurement is a number and keeps enough."""
    return row.is_finite and (least is None or (row.recovery or 0.0) >= least)


def _write(arguments: argparse.Namespace, rows: "list[Row]", answers: list[dict[str, str]]) -> None:
    """Write what has been measured so far to --json; raises InputError if it cannot be written."""
    if not arguments.json:
        return
    measured = [_plain(row) | {"ok": _is_ok(row, arguments.min_recovery)} for row in rows]
    from pgsvd_vllm.offline.model.hub import public_name

    names = {key: given and public_name(given) for key, given in vars(arguments).items() if key in ("model", "against")}
    found = {**names, "rows": measured, "answers": answers}
    try:
        arguments.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {arguments.json}: cannot be written ({error.strerror})") from None


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before any model is loaded; raises InputError."""
    if arguments.num_samples < 0 or arguments.num_samples == 1:
        raise InputError(f"--num-samples {arguments.num_samples}: must be 0 or at least {LEAST_WINDOWS}")
    if arguments.max_seq_length < 8:
        raise InputError(f"--max-seq-length {arguments.max_seq_length}: must be at least 8")
    if arguments.min_recovery is not None and not 0 < arguments.min_recovery < math.inf:
        raise InputError(f"--min-recovery {arguments.min_recovery}: must be a positive share, such as 0.97")
    if arguments.min_recovery is not None and arguments.against is None:
        raise InputError("--min-recovery: is a share of a base's quality; name the base with --against")
    if arguments.backend == "vllm" and find_spec("vllm") is None:
        raise InputError("--backend vllm: vLLM is not installed; install it or choose hf")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.resolve().parent.is_dir()):
        raise InputError(f"--json {arguments.json}: is a folder, or lies in none; name a file to write")
    if arguments.text_column is not None and arguments.dataset is None:
        raise InputError(f"--text-column {arguments.text_column}: names a field of the rows of --dataset; give both")
    from pgsvd_vllm.evaluation.tasks import check_tasks

    check_tasks(arguments.tasks or (), arguments.limit)


def _texts(
    arguments: argparse.Namespace, folders: list[Path], prompts: list[str]
) -> tuple[list["Row"], list[list[str]]]:
    """The row of perplexity, and the answers of every model."""
    if not arguments.num_samples and not prompts:
        return [], []
    from pgsvd_vllm.evaluation.models import greedy_answers, load_model
    from pgsvd_vllm.evaluation.perplexity import text_windows, window_losses
    from pgsvd_vllm.evaluation.recovery import compared
    from pgsvd_vllm.offline.data.text import load_tokenizer
    from pgsvd_vllm.offline.data.tokens import window_length
    from pgsvd_vllm.offline.model.device import pick_device
    from pgsvd_vllm.offline.model.free_memory import give_back

    count, described = arguments.num_samples, ""
    tokenizer: Any = load_tokenizer(folders[0], arguments.trust_remote_code)
    device, windows, losses, answers = pick_device(arguments.device), None, [], []
    for folder, label in zip(folders, LABELS, strict=False):
        model = load_model(folder, device, arguments.trust_remote_code)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise InputError(f"{folder}: has fewer embeddings than the tokenizer of {folders[0]} has tokens")
        length = window_length(model.config, arguments.max_seq_length)
        if count and windows is None:
            described, windows = text_windows(
                arguments.dataset, tokenizer, count, length, "--dataset", arguments.text_column
            )
        try:
            if windows is not None:
                losses.append(window_losses(model, windows[:, :length], desc=f"perplexity of {label}"))
            answers.append(greedy_answers(model, tokenizer, prompts, ANSWER_TOKENS))
        except Exception as error:  # lack of memory, chat templates, and what else transformers meets
            raise InputError(f"{folder}: cannot be evaluated ({reason_of(error)})") from None
        del model
        give_back()
    if windows is None:
        return [], answers
    return [compared(described, "perplexity", losses[0], losses[1] if len(losses) > 1 else None)], answers


def _tasks(arguments: argparse.Namespace, folders: list[Path]) -> list["Row"]:
    """The rows of the tasks."""
    if not arguments.tasks:
        return []
    from pgsvd_vllm.evaluation.recovery import compared
    from pgsvd_vllm.evaluation.tasks import Job, score

    backend = arguments.backend or ("vllm" if find_spec("vllm") else "hf")
    given = (arguments.limit, arguments.device, arguments.model_args, arguments.trust_remote_code)
    found = [score(Job(str(folder), arguments.tasks, backend, *given)) for folder in folders]
    return [
        compared(task, name, values, found[1][task][1] if len(found) > 1 else None)
        for task, (name, values) in found[0].items()
    ]


def _plain(row: "Row") -> dict[str, Any]:
    """A row for JSON, which has no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }
