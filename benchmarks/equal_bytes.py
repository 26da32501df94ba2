"""Perplexity against bits per weight: quantization alone, low rank alone, and both.

    python benchmarks/equal_bytes.py --wikitext DIR [--c4 FILE] [--model NAME] [--quick] [--ratios R ...]
        [--bits B ...] [--forms F ...] [--work DIR] [--json FILE]

All cases have the calibration and the windows of quality.py. Bits are those of the stored projections, scales included,
for each element of their dense weights; embeddings and norms stay as they are. Activations stay in 16 bits, as
transformers computes. `nearest` rounds dense weights to the nearest value without calibration, `compensated` with
error compensation (GPTQ) as `--bits` does. Finished cases are kept in the work folder.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.perplexity import perplexity
from benchmarks.quality import MODELS, evaluation_texts, factored, quality_plan, save, with_options
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.offline.compress import calibrate
from pgsvd_vllm.offline.factors.factorize import factor_layers
from pgsvd_vllm.offline.output.checkpoint import write_checkpoint
from pgsvd_vllm.offline.output.outcome import Choice
from pgsvd_vllm.offline.planning.identity import CALIBRATION_VERSION
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.stored import module_table
from pgsvd_vllm.offline.rounding.run import round_layers
from pgsvd_vllm.offline.run_state import RunState

RATIOS, QUICK_RATIOS = (0.1, 0.2, 0.3, 0.4), (0.2, 0.4)
FORMS = ("pivot", "factors")
BITS = ("16", "8", "fp8", "4")
# Of weights that are rounded to nearest: bits and inputs that share a scale (None: all inputs of an output).
NEAREST: dict[str, tuple[int, int | None]] = {"8": (8, None), "4": (4, 32), "3": (3, 32)}
SCALE_BITS = 16
# Largest loss that the bits add, as a factor of the perplexity of the same factors in 16 bits.
ADDED = {"8": 1.003, "fp8": 1.006}


@dataclass(frozen=True)
class Case:
    """One compressed model.

    Attributes:
        bits: a value of `--bits`.
        ratio: removed share of the projections' parameters; 0 for dense ones.
        form: of the factors; `compensated` or `nearest` for dense ones.
    """

    bits: str
    ratio: float
    form: str

    @property
    def name(self) -> str:
        """Such as `8 bits, 20 % removed, pivot`."""
        kind = "FP8" if self.bits == "fp8" else f"{self.bits} bits"
        return f"{kind}, {self.form}" if not self.ratio else f"{kind}, {self.ratio:.0%} removed, {self.form}"


def round_to_nearest(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """A weight [out, in] after symmetric rounding, dequantized to its dtype.

    Args:
        weight: floating point, [out, in].
        bits: of a stored integer.
        group: inputs that share a scale; the last group may be smaller. None: one scale for an output channel.
    """
    most = 2 ** (bits - 1) - 1
    pieces = []
    for piece in weight.float().split(group or weight.shape[1], dim=1):
        scale = (piece.abs().amax(1, keepdim=True) / most).clamp_min(torch.finfo(torch.float16).tiny)
        pieces.append((piece / scale).round().clamp(-most - 1, most) * scale)
    return torch.cat(pieces, 1).to(weight.dtype)


@torch.no_grad()
def nearest_model(folder: Path, bits: str) -> tuple[PreTrainedModel, float]:
    """The model with its decoder's projections rounded to nearest, and the mean stored bits of their weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    number, group = NEAREST[bits]
    stored = weights = 0.0
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(round_to_nearest(module.weight, number, group))
            columns = module.in_features
            stored += (number + SCALE_BITS * -(-columns // (group or columns)) / columns) * module.weight.numel()
            weights += module.weight.numel()
    return model, stored / weights


def stored_bits(folder: Path, plan: Plan) -> float:
    """Bits of a checkpoint's projections for each element of their dense weights."""
    checkpoint = open_checkpoint(folder)
    size = sum(info.nbytes for p in plan.projections.flat for info in checkpoint.stored(p.name))
    return 8 * size / sum(p.numel for p in plan.projections.flat)


def choice_of(plan: Plan, state: RunState, case: Case) -> Choice:
    """Factor the projections as a case wants, or leave them dense."""
    if case.ratio:
        return factored(plan, state)
    modules = module_table(plan.projections.flat, {}, plan.settings.storages[0])
    factor_layers(plan.source, plan.data, plan.settings, plan.projections, state, modules)
    round_layers(plan.source, plan.settings, plan.projections, state, modules)
    return Choice(Allocation({}, modules, 0.0, 0.0))


def models(plan: Plan, state: RunState, cases: list[Case]) -> Iterator[tuple[Case, PreTrainedModel, float]]:
    """Every case with its model and its bits per weight; cases of the same factors must follow each other."""
    for case in cases:
        if case.form == "nearest":
            yield (case, *nearest_model(plan.source.folder, case.bits))
            continue
        # Dense projections have no factors to fit.
        changes = {"ratio": case.ratio, "form": case.form} if case.ratio else {"sequential": False}
        own = with_options(plan, bits=case.bits, **changes)
        write_checkpoint(own, state, choice_of(own, state, case))
        bits = stored_bits(state.checkpoint, own)
        yield case, AutoModelForCausalLM.from_pretrained(state.checkpoint, dtype="auto"), bits
        shutil.rmtree(state.checkpoint, ignore_errors=True)


def rows_of(found: dict[str, dict[str, float]], cases: list[Case], texts: list[str]) -> Iterator[dict[str, object]]:
    """Multiples of dense, and what the bits add to the same factors in 16 bits, with its bar."""
    dense = found["dense"]
    for case in cases:
        own = found.get(case.name)
        if own is None:
            continue
        plain = found.get(Case("16", case.ratio, case.form).name)
        for text in texts:
            value = own[text] / dense[text]
            yield {"case": f"{case.name} {text}", "bits": own["bits"], "value": value, "bar": None, "ok": True}
            if plain is not None and case.bits in ADDED and case.ratio:
                added, bar = own[text] / plain[text], ADDED[case.bits]
                row = {"case": f"{case.name} {text}, over 16 bits", "bits": own["bits"]}
                yield row | {"value": added, "bar": bar, "ok": added <= bar}


def main() -> int:
    """Measure, print the table, write JSON; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR", help="has wiki.valid.raw, wiki.test.raw")
    parser.add_argument("--c4", type=Path, metavar="FILE", help=".jsonl with a text field, evaluated as well")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--quick", action="store_true", help="20 and 40 %% only, a quarter of the windows")
    parser.add_argument("--work", type=Path, help="kept between runs (default: in the user's cache)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    ratios = tuple(QUICK_RATIOS if arguments.quick else RATIOS) if arguments.ratios is None else arguments.ratios
    cases = [Case(bits, 0, "nearest") for bits in NEAREST]
    cases += [Case(bits, 0, "compensated") for bits in arguments.bits if bits != "16"]
    # The groups of 4 bits have ranks of their own: these cases are factored once more.
    cases += [Case(b, r, f) for f in arguments.forms for r in ratios for b in arguments.bits]

    plan = quality_plan(arguments.wikitext, arguments.work, model=arguments.model)
    folder, count = plan.source.folder, 15 if arguments.quick else 60
    windows, _ = evaluation_texts(arguments.wikitext, arguments.c4, folder, count)
    results = plan.options.output.with_name(f"bytes-{plan.options.output.name}-{count}-{CALIBRATION_VERSION}.json")
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
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in table) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:
        sys.exit(f"equal_bytes.py: error: {problem}")
