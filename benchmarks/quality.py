"""Perplexity of compressed models, methods x removed shares x texts, as multiples of dense.

    python benchmarks/quality.py --wikitext DIR [--c4 FILE] [--model NAME] [--seed N] [--quick]
        [--calibration-windows N] [--keep DIR] [--json FILE] [--markdown FILE] [--plot FILE]

DIR holds wiki.valid.raw for calibration and wiki.test.raw for evaluation; no choice depends on the test text. Every
second document of FILE is for evaluation; the others are calibration text of the mixed case alone. Calibration runs
once for all methods and shares. It and every finished case are kept in the work folder, separately for every model and
seed, so an interrupted run continues. Every case is evaluated as a checkpoint loaded by transformers, which --keep
leaves in a folder for other measurements. Bars are for 128 calibration windows.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.rows import write_rows
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.evaluation.perplexity import perplexity, spread_windows
from pgsvd_vllm.offline.compress import calibrate
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.planning.identity import CALIBRATION_VERSION
from pgsvd_vllm.offline.planning.plan import Plan, make_plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.sweep.run import factored, with_options
from tests.support import reference_model

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
QUICK_RATIOS = (0.2, 0.4, 0.6)
REFINED = "default, refined"
MIXED = "default, mixed calibration"
# Method -> the options that select it, as on the command line.
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"baseline": "svd"},
    "asvd": {"baseline": "asvd"},
    "svd-llm": {"baseline": "svd-llm"},
    "pifa": {"baseline": "pifa"},
    "pgsvd, uniform": {"sensitivity": "uniform"},
    "measured, factors": {"form": "factors", "sequential": False, "refine": 0},
    "measured, pivot": {"sequential": False, "refine": 0},
    "default, not distilled": {"refine": 0},
    "default": {},
    REFINED: {},
    MIXED: {},
}
# Largest allowed multiples of dense.
BARS: dict[str, dict[tuple[str, str], dict[float, float]]] = {
    "smollm2": {
        ("default", "wikitext"): {0.2: 1.078, 0.4: 1.48, 0.6: 2.20},
        (REFINED, "wikitext"): {0.2: 1.048, 0.4: 1.28, 0.6: 1.75},
        ("default", "c4"): {0.2: 1.15},
        (MIXED, "c4"): {0.2: 1.10},
    },
    "gemma3": {("default", "wikitext"): {0.2: 1.13, 0.4: 1.90}},
}
MODELS = {"smollm2": reference_model.smollm2, "gemma3": reference_model.gemma3}
LENGTH = 1024
WINDOWS = 128


def paper_form(raw: str) -> str:
    """WikiText in the form that papers use: its rows, joined by blank lines."""
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in raw.split("\n"))


def save(found: Mapping[str, object], path: Path) -> None:
    """Write finished cases; an interruption leaves the file as it was."""
    path.with_suffix(".writing").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".writing").replace(path)


def evaluation_texts(
    wikitext: Path, c4: Path | None, folder: Path, count: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The windows of every text that is evaluated, and the documents of C4 that are not.

    Args:
        wikitext: folder of wiki.test.raw.
        c4: .jsonl with a text field, or None.
        folder: of the model.
        count: windows of each text.

    Raises:
        InputError: a text holds fewer.
    """
    tokenizer = load_tokenizer(folder)
    texts = {"wikitext": [paper_form((wikitext / "wiki.test.raw").read_text(encoding="utf-8"))]}
    others: list[str] = []
    if c4:
        documents = list(read_documents(str(c4), 4 * count * LENGTH, tokenizer))
        others, texts["c4"] = documents[::2], documents[1::2]
    windows = {name: spread_windows(tokenizer, documents, count, LENGTH) for name, documents in texts.items()}
    return windows, others


def quality_plan(
    wikitext: Path,
    work: Path | None,
    documents: Sequence[str] = (),
    model: str = "smollm2",
    seed: int = 0,
    windows: int = WINDOWS,
) -> Plan:
    """A model calibrated on WikiText-2's validation text; finished work is in the work folder.

    Args:
        wikitext: folder of wiki.valid.raw.
        work: folder, or None for one in the user's cache.
        documents: mixed with that text, half and half.
        model: one of MODELS.
        seed: random seed of the windows of the text and of the sampled labels of the gradients.
        windows: of LENGTH tokens to calibrate on.
    """
    work = work or reference_model.cache_folder() / "quality"
    work.mkdir(parents=True, exist_ok=True)
    # In the form of the evaluated text: tokens of blank lines that calibration has not seen cost 4 % of perplexity.
    text = work / "wiki.valid.txt"
    text.write_text(paper_form((wikitext / "wiki.valid.raw").read_text(encoding="utf-8")), encoding="utf-8")
    others = work / "others.jsonl"
    if documents:
        others.write_text("".join(json.dumps({"text": row}) + "\n" for row in documents), encoding="utf-8")
    name = f"{model}-{seed}" + ("-mixed" if documents else "") + (f"-{windows}" if windows != WINDOWS else "")
    return make_plan(
        CompressOptions(
            str(MODELS[model]()),
            work / name,
            dataset=(str(text), str(others)) if documents else (str(text),),
            num_calibration_samples=windows,
            max_seq_length=LENGTH,
            seed=seed,
            serve_on="cpu",  # the pivot form, on GPUs as well
            resume=True,
        )
    )


def compressed(plan: Plan, state: RunState, method: str, ratio: float, minutes: float) -> PreTrainedModel:
    """The model of one case, in the dtype it is stored in; `minutes` of distillation if the method has it."""
    plan = with_options(plan, ratio=ratio, **METHODS[method], **({"refine": minutes} if method == REFINED else {}))
    write_checkpoint(plan, state, factored(plan, state, print))
    # Weights are mapped from the files: these must stay until the model has been evaluated.
    return AutoModelForCausalLM.from_pretrained(state.checkpoint, dtype="auto")


def rows_of(
    found: dict[str, float],
    ratios: tuple[float, ...],
    texts: list[str],
    bars: Mapping[tuple[str, str], dict[float, float]],
) -> Iterator[dict[str, object]]:
    """Every finished case as a multiple of dense, with its bar where it has one."""
    for method in METHODS:
        for ratio in ratios:
            for text in texts:
                key = f"{method} {ratio} {text}"
                if key not in found:
                    continue
                value = found[key] / found[f"dense {text}"]
                bar = bars.get((method, text), {}).get(ratio)
                yield {"case": key, "value": value, "bar": bar, "ok": bar is None or value <= bar}


def markdown(found: dict[str, float], ratios: tuple[float, ...], texts: list[str]) -> str:
    """One table a text: a method a line, a removed share a column."""
    lines: list[str] = []
    for text in texts:
        dense = found[f"dense {text}"]
        lines += [f"{text}, dense {dense:.2f}; multiples of dense", ""]
        lines += ["| method | " + " | ".join(f"{r:.0%}" for r in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
        for method in METHODS:
            values = [found.get(f"{method} {r} {text}") for r in ratios]
            if any(v is not None for v in values):
                cells = ["-" if v is None else f"{v / dense:.4g}" for v in values]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, float], ratios: tuple[float, ...], texts: list[str], path: Path) -> None:
    """One panel a text: multiples of dense over the removed share, a line a method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(texts), figsize=(6 * len(texts), 4.5), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for number, method in enumerate(METHODS):
            done = [r for r in ratios if f"{method} {r} {text}" in found]
            values = [found[f"{method} {r} {text}"] / found[f"dense {text}"] for r in done]
            if done:
                panel.plot([100 * r for r in done], values, marker="o", label=method, color=f"C{number}")
        panel.set(title=text, xlabel="parameters removed, %", ylabel="perplexity, multiple of dense", yscale="log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis("{x:g}")
        panel.set_xticks([100 * r for r in ratios])
        panel.grid(alpha=0.3, which="both")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print the table, write JSON; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR", help="has wiki.valid.raw, wiki.test.raw")
    parser.add_argument("--c4", type=Path, metavar="FILE", help=".jsonl with a text field, evaluated as well")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the calibration (default 0)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS)
    parser.add_argument("--refine-minutes", type=float, default=20.0, metavar="M", help="minutes of the refined case")
    parser.add_argument("--quick", action="store_true", help="only 20, 40 and 60 %%, a quarter of the windows")
    parser.add_argument(
        "--calibration-windows",
        type=int,
        default=WINDOWS,
        metavar="N",
        help=f"of {LENGTH} tokens; {WINDOWS} if not given",
    )
    parser.add_argument("--work", type=Path, help="kept between runs (default: in the user's cache)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="also copy the checkpoint of every case there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib (the extra `plot`)")
    arguments = parser.parse_args()
    ratios = tuple(arguments.ratios or (QUICK_RATIOS if arguments.quick else RATIOS))
    count = 15 if arguments.quick else 60

    def planned(documents: Sequence[str] = ()) -> Plan:
        given = (arguments.model, arguments.seed, arguments.calibration_windows)
        return quality_plan(arguments.wikitext, arguments.work, documents, *given)

    plan = planned()
    folder = plan.source.folder
    windows, mixed_in = evaluation_texts(arguments.wikitext, arguments.c4, folder, count)

    dtype = str(plan.settings.compute_dtype).removeprefix("torch.")  # that of `perplexity`
    name = f"results-{plan.options.output.name}-{count}-{dtype}-{CALIBRATION_VERSION}.json"
    results = plan.options.output.with_name(name)
    found: dict[str, float] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}

    def evaluate(model: PreTrainedModel, case: str) -> None:
        model.eval().to(plan.settings.device)
        for name, ids in windows.items():
            found[f"{case} {name}"] = perplexity(model, ids, desc=f"{case} {name}")
        save(found, results)

    def missing(case: str) -> bool:
        return any(f"{case} {name}" not in found for name in windows)

    def kept(method: str, ratio: float) -> Path:
        """The folder of a case's checkpoint."""
        return arguments.keep / f"{plan.options.output.name}-{method.replace(', ', '-').replace(' ', '-')}-{ratio}"

    if missing("dense"):
        evaluate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), "dense")
    # The cases of one share follow each other: they take over the layers that are factored already.
    cases = [(method, ratio) for ratio in ratios for method in arguments.methods]
    for mixed in (False, True) if mixed_in else (False,):
        todo = [
            (m, r)
            for m, r in cases
            if (m == MIXED) == mixed and (missing(f"{m} {r}") or (arguments.keep and not kept(m, r).is_dir()))
        ]
        if not todo:
            continue
        calibrated = planned(mixed_in) if mixed else plan
        state = open_state(calibrated)
        start = time.monotonic()
        calibrate(calibrated, state)
        print(f"calibration {time.monotonic() - start:.0f} s in this run", flush=True)
        for method, ratio in todo:
            begun = time.monotonic()
            model = compressed(calibrated, state, method, ratio, arguments.refine_minutes)
            print(f"{method} {ratio}: factored in {time.monotonic() - begun:.0f} s", flush=True)
            evaluate(model, f"{method} {ratio}")
            if arguments.keep:
                shutil.rmtree(kept(method, ratio), ignore_errors=True)
                shutil.copytree(state.checkpoint, kept(method, ratio))
            shutil.rmtree(state.checkpoint, ignore_errors=True)
        state.close()  # the next calibration may use the same folder

    bars = BARS[arguments.model] if arguments.calibration_windows == WINDOWS else {}
    table = list(rows_of(found, ratios, list(windows), bars))
    text = markdown(found, ratios, list(windows))
    print(text)
    for row in table:
        if row["bar"] is not None:
            print(f"{row['case']:30} {row['value']:.3f}  bar {row['bar']}  {'ok' if row['ok'] else 'MISSED'}")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.plot:
        plot(found, ratios, list(windows), arguments.plot)
    write_rows(arguments.json, table)
    return 0 if all(row["ok"] for row in table) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:
        sys.exit(f"quality.py: error: {problem}")
