"""What `pareto` and `study` share: the options of their measurements, and a folder that keeps what is measured."""

import argparse
import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.cli.model_arguments import add_text_column
from pgsvd_vllm.errors import InputError, PgsvdError, lacks_memory, refusal_of

if TYPE_CHECKING:
    import torch

    from pgsvd_vllm.offline.options import CompressOptions
    from pgsvd_vllm.offline.planning.plan import Plan

LENGTH = 1024
# The options that every measured value depends on, and those that perplexity depends on as well.
CALIBRATED_BY = ("model", "revision", "dataset", "text_column", "num_calibration_samples", "max_seq_length", "seed")
JUDGED_BY = ("eval_dataset", "num_samples")


def add_folder(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add `--output-dir`, a folder that is continued if it exists."""
    parser.add_argument("-o", "--output-dir", required=True, type=Path, metavar="FOLDER", help=help_text)


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """Add the options of the calibration, of the text for perplexity, and of the machine."""
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME|FILE|FOLDER",
        help="calibration text, as of compress --dataset (default: what the model samples from itself)",
    )
    add_text_column(parser)
    parser.add_argument("--num-calibration-samples", type=int, metavar="N", help="windows, as of compress")
    parser.add_argument(
        "--max-seq-length", type=int, default=LENGTH, metavar="L", help=f"tokens per window (default {LENGTH})"
    )
    parser.add_argument(
        "--eval-dataset",
        metavar="NAME|FILE|FOLDER",
        help="text for perplexity (default: docstrings of Python's standard library); take text that calibration has "
        "not seen",
    )
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="windows of this text (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the calibration (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if available)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the model's repository")


def check_measurement(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before any model is loaded; raises InputError."""
    from pgsvd_vllm.report.page import check_libraries

    check_libraries()
    if arguments.num_samples < 2:
        raise InputError(f"--num-samples {arguments.num_samples}: must be at least 2")


def calibration_options(arguments: argparse.Namespace) -> "CompressOptions":
    """The options of the calibration, which FOLDER/calibration keeps; an interruption leaves FOLDER/work.partial."""
    from pgsvd_vllm.offline.options import CompressOptions

    return CompressOptions(
        model=arguments.model,
        revision=arguments.revision,
        output=arguments.output_dir / "work",
        dataset=None if arguments.dataset is None else tuple(arguments.dataset),
        num_calibration_samples=arguments.num_calibration_samples,
        max_seq_length=arguments.max_seq_length,
        text_column=arguments.text_column,
        seed=arguments.seed,
        calibration=arguments.output_dir / "calibration",
        device=arguments.device,
        resume=True,
        trust_remote_code=arguments.trust_remote_code,
    )


def held_out_windows(arguments: argparse.Namespace, plan: "Plan") -> tuple[str, "torch.Tensor"]:
    """A line that says what perplexity is measured on, and the windows; raises InputError as `text_windows`."""
    from pgsvd_vllm.evaluation.perplexity import text_windows
    from pgsvd_vllm.offline.data.text import load_tokenizer
    from pgsvd_vllm.offline.data.tokens import window_length

    tokenizer = load_tokenizer(plan.source.folder, arguments.trust_remote_code)
    length = window_length(plan.source.config, arguments.max_seq_length)
    return text_windows(arguments.eval_dataset, tokenizer, arguments.num_samples, length, "--eval-dataset")


def perplexity_of(folder: Path, plan: "Plan", windows: "torch.Tensor", label: str) -> float:
    """Perplexity of a model in a folder; NaN if it is not finite.

    Args:
        folder: of the model.
        plan: whose device and options it is loaded with.
        windows: int64 [count, length].
        label: of the model.

    Raises:
        InputError: the model cannot be loaded, or predicts no text.
    """
    from pgsvd_vllm.evaluation.models import load_model
    from pgsvd_vllm.evaluation.perplexity import perplexity
    from pgsvd_vllm.offline.model.free_memory import give_back

    model = load_model(folder, plan.settings.device, plan.options.trust_remote_code)
    value = perplexity(model, windows, desc=f"perplexity of {label}")
    del model
    give_back()
    return value


def dense_perplexity(plan: "Plan", windows: "torch.Tensor", text: str) -> float:
    """Perplexity of the plan's model; raises InputError if it is not finite, or as `perplexity_of`."""
    value = perplexity_of(plan.source.folder, plan, windows, "dense")
    if not math.isfinite(value):
        raise InputError(f"MODEL {plan.options.model}: its own perplexity on {text} is not a finite number")
    return value


def texts_of(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Name of an option -> its value as JSON."""
    return {name: json.dumps(getattr(arguments, name)) for name in names}


def request_of(texts: Mapping[str, str]) -> dict[str, str]:
    """Option -> hash of its value, from those of `texts_of`: a published file names no paths."""
    return {
        f"--{name}".replace("_", "-"): hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()
    }


class Measured:
    """Measured values in a JSON file, which is written after each of them.

    Args:
        path: of the file; its folder is created if it is missing.
        request: option -> hash of its value, of those that the values depend on.
        empty: further keys of a new file, with their values.

    Raises:
        InputError: the file holds values for another request, or something else.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, request: dict[str, str], empty: dict[str, Any]) -> None:
        from pgsvd_vllm.format.reader import read_json

        self._path = path
        self.values: dict[str, Any] = {"request": request, **empty}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self.values = read_json(path)
            old = self.values.get("request")
            if old != request or any(type(self.values.get(key)) is not type(value) for key, value in empty.items()):
                changed = [key for key in request if not isinstance(old, dict) or old.get(key) != request[key]]
                found = f"made with another {', '.join(changed)}" if changed else "holds something else"
                raise InputError(f"{path}: {found}; choose another --output-dir")
        self.save()  # before hours of work

    def save(self) -> None:
        """Write the file; an interruption leaves it as it was."""
        part = self._path.with_suffix(".writing")
        part.write_text(json.dumps(self.values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self._path)


@contextlib.contextmanager
def refusals_named(folder: Path) -> Iterator[None]:
    """Turn what the system refuses, such as a write to a full disk, into an InputError that names the output folder."""
    try:
        yield
    except PgsvdError:
        raise
    except Exception as error:  # of the system; safetensors and torch have kinds of their own
        output = f"--output-dir {folder}"
        refused = f"{output}: not enough memory is free" if lacks_memory(error) else refusal_of(error, output)
        if refused is None:
            raise
        raise InputError(f"{refused}; what is finished is kept, repeat the command") from None
