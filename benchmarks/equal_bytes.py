"""Perplexity against bits per weight: quantization alone, low rank alone, both, and ranks and bits chosen together.

    python benchmarks/equal_bytes.py --wikitext DIR [--c4 FILE] [--model NAME] [--quick] [--sizes B ...]
        [--ratios R ...] [--bits B ...] [--forms F ...] [--work DIR] [--json FILE]

All cases have the calibration and the windows of quality.py. Bits are those of the stored projections, scales included,
for each element of their dense weights; embeddings and norms stay as they are. Activations stay in 16 bits, as
transformers computes. `nearest` rounds dense weights to the nearest value without calibration, `compensated` with
error compensation (GPTQ) as `--bits` does. `auto` is `--bits auto` for a size, compared with the compensated dense
weights of that size. Finished cases are kept in the work folder.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.quality import MODELS, evaluation_texts, quality_plan, save
from benchmarks.rows import write_rows
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.evaluation.perplexity import perplexity
from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.compress import calibrate
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.planning.identity import CALIBRATION_VERSION
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.rounding.error_compensated import round_matrix, to_grid
from pgsvd_vllm.offline.rounding.forms import damped
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.sweep.run import factored, with_options

RATIOS, QUICK_RATIOS = (0.1, 0.2, 0.3, 0.4), (0.2, 0.4)
FORMS = ("pivot", "factors")
BITS = ("16", "8", "fp8", "4")
# Bits per weight, and the dense weights with about as many: integers that share a scale per output or per 32 inputs.
SIZES: dict[float, Scheme] = {
    8.0: Scheme(8, "int"),
    6.0: Scheme(6, "int"),
    5.0: Scheme(5, "int"),
    4.5: Scheme(4, "int", 32),
    4.0: Scheme(4, "int"),
    3.5: Scheme(3, "int", 32),
    3.0: Scheme(3, "int"),
}
NEAREST = (8.0, 4.5, 3.5)
# Largest loss that the bits add, as a factor of the perplexity of the same factors in 16 bits.
ADDED = {"8": 1.003, "fp8": 1.006}
# Largest perplexity of ranks and bits chosen together, over the compensated dense weights of that size.
BESIDE_DENSE = {8.0: 1.01, 6.0: 1.01, 5.0: 1.01, 4.5: 1.01, 4.0: 1.01, 3.5: 0.9, 3.0: 0.9}


@dataclass(frozen=True)
class Case:
    """One compressed model.

    Attributes:
        bits: a value of `--bits`, or bits per weight.
        ratio: removed share of the projections' parameters; 0 for dense ones.
        form: of the factors; `compensated` or `nearest` for dense ones, `auto` for ranks and bits chosen together.
    """

    bits: str
    ratio: float
    form: str

    @property
    def name(self) -> str:
        """Such as `8 bits, 20 % removed, pivot`."""
        kind = "FP8" if self.bits == "fp8" else f"{self.bits} bits"
        return f"{kind}, {self.form}" if not self.ratio else f"{kind}, {self.ratio:.0%} removed, {self.form}"

    @property
    def options(self) -> dict[str, Any]:
        """The options of `compress` that make a model which is not only rounded."""
        if self.form == "auto":
            return {"bits": "auto", "ratio": 1 - float(self.bits) / 16}
        return {"bits": self.bits, "ratio": self.ratio, "form": self.form}


@torch.no_grad()
def rounded_model(plan: Plan, state: RunState, case: Case) -> tuple[PreTrainedModel, float]:
    """The dense model with its projections rounded, and the mean stored bits of their weights."""
    model = AutoModelForCausalLM.from_pretrained(plan.source.folder, dtype="auto")
    scheme = SIZES[float(case.bits)]
    stored = weights = 0
    for index, row in enumerate(plan.projections.layers):
        data = state.load_layer(index)
        for p in row:
            weight: Any = model.get_submodule(p.path).weight
            if case.form == "nearest":
                scale = widest_scale(weight.double(), scheme)
                each = scale.double().repeat_interleave(p.in_features // scale.shape[1], dim=1)
                matrix = to_grid(weight / each, scheme) * each
            else:
                gram = damped(data.grams[data.leader[p.name]].double(weight.device))
                matrix = round_matrix(weight.double(), gram, scheme).matrix()
            weight.copy_(matrix)
            stored += 8 * scheme.nbytes(p.out_features, p.in_features)
            weights += p.numel
    return model, stored / weights


def widest_scale(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale of every group that clips nothing, [rows, groups]."""
    parts = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
    return (parts.abs().amax(-1) / scheme.bounds[1]).clamp_min(torch.finfo(torch.float32).tiny)


def stored_bits(folder: Path, plan: Plan) -> float:
    """Bits of a checkpoint's projections for each element of their dense weights."""
    checkpoint = open_checkpoint(folder)
    size = sum(info.nbytes for p in plan.projections.flat for info in checkpoint.stored(p.name))
    return 8 * size / sum(p.numel for p in plan.projections.flat)


def models(plan: Plan, state: RunState, cases: list[Case]) -> Iterator[tuple[Case, PreTrainedModel, float]]:
    """Every case with its model and its bits per weight; cases of the same factors must follow each other."""
    for case in cases:
        if not case.ratio and case.form != "auto":
            yield (case, *rounded_model(plan, state, case))
            continue
        own = with_options(plan, **case.options)
        calibrate(own, state)  # tries bits where they are chosen
        write_checkpoint(own, state, factored(own, state, print))
        bits = stored_bits(state.checkpoint, own)
        yield case, AutoModelForCausalLM.from_pretrained(state.checkpoint, dtype="auto"), bits
        shutil.rmtree(state.checkpoint, ignore_errors=True)


def rows_of(found: dict[str, dict[str, float]], cases: list[Case], texts: list[str]) -> Iterator[dict[str, object]]:
    """Multiples of dense, and of the case that each is compared with, with their bars."""
    dense = found["dense"]
    for case in cases:
        own = found.get(case.name)
        if own is None:
            continue
        for text in texts:
            value = own[text] / dense[text]
            yield {"case": f"{case.name} {text}", "bits": own["bits"], "value": value, "bar": None, "ok": True}
            beside: list[tuple[str, dict[str, float] | None, float | None]] = []
            if case.ratio and case.bits in ADDED:
                beside.append(("16 bits", found.get(Case("16", case.ratio, case.form).name), ADDED[case.bits]))
            if case.form == "auto":
                dense_case = Case(case.bits, 0, "compensated")
                beside.append(("compensated", found.get(dense_case.name), BESIDE_DENSE[float(case.bits)]))
            for what, other, bar in beside:
                if other is not None:
                    row = {"case": f"{case.name} {text}, over {what}", "bits": own["bits"]}
                    over = own[text] / other[text]
                    yield row | {"value": over, "bar": bar, "ok": bar is None or over <= bar}


def main() -> int:
    """Measure, print the table, write JSON; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR", help="has wiki.valid.raw, wiki.test.raw")
    parser.add_argument("--c4", type=Path, metavar="FILE", help=".jsonl with a text field, evaluated as well")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--sizes", nargs="*", type=float, choices=SIZES, default=list(SIZES), help="bits per weight")
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--quick", action="store_true", help="20 and 40 %% only, a quarter of the windows")
    parser.add_argument("--work", type=Path, help="kept between runs (default: in the user's cache)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    ratios = tuple(QUICK_RATIOS if arguments.quick else RATIOS) if arguments.ratios is None else arguments.ratios
    cases = [Case(f"{size:g}", 0, "nearest") for size in arguments.sizes if size in NEAREST]
    cases += [Case(f"{size:g}", 0, form) for form in ("compensated", "auto") for size in arguments.sizes]
    # The groups of 4 bits have ranks of their own: these cases are factored once more.
    cases += [Case(b, r, f) for f in arguments.forms for r in ratios for b in arguments.bits]

    plan = quality_plan(arguments.wikitext, arguments.work, model=arguments.model)
    folder, count = plan.source.folder, 15 if arguments.quick else 60
    windows, _ = evaluation_texts(arguments.wikitext, arguments.c4, folder, count)
    results = plan.options.output.with_name(f"sizes-{plan.options.output.name}-{count}-{CALIBRATION_VERSION}.json")
    found: dict[str, dict[str, float]] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}

    def evaluate(model: PreTrainedModel, name: str, bits: float) -> None:
        model.eval().to(plan.settings.device)
        found[name] = {text: perplexity(model, ids, desc=f"{name} {text}") for text, ids in windows.items()}
        found[name]["bits"] = bits
        save(found, results)

    if "dense" not in found:
        evaluate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), "dense", 16.0)
    todo = [case for case in cases if case.name not in found]
    if todo:
        state = open_state(plan)
        calibrate(plan, state)
        for case, model, bits in models(plan, state, todo):
            evaluate(model, case.name, bits)
        state.close()
    table = list(rows_of(found, cases, list(windows)))
    print(f"{'':44}{'bits per weight':>16}{'over dense':>12}")
    for row in table:
        bar = "" if row["bar"] is None else f"  bar {row['bar']}  {'ok' if row['ok'] else 'MISSED'}"
        print(f"{row['case']:44}{row['bits']:16.2f}{row['value']:12.4f}{bar}")
    write_rows(arguments.json, table)
    return 0 if all(row["ok"] for row in table) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:
        sys.exit(f"equal_bytes.py: error: {problem}")
