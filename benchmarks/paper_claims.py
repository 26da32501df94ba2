"""Claims of the PGSVD paper (arXiv 2510.05544), checked on the reference model.

    python benchmarks/paper_claims.py --wikitext DIR [--model NAME] [--kinds] [--quick] [--json FILE] [--markdown FILE]

The questions: Is one uniform tolerance on the Pareto front, of the paper's own surrogate (the sum of squared relative
errors) and of the predicted loss? How does alternating least squares compare with the exact solution? How much do
attention and feed-forward projections matter? And beyond the paper: Should projections of one input share a down
factor? How much do ranks without gradients lose? DIR and the calibration are those of quality.py.

The solver and the uniform ratio have bars; the exit status is 1 where one is missed.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality import MODELS, RATIOS, quality_plan
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gram import advance
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.compress import calibrate, measured_spectra
from pgsvd_vllm.offline.factors.solvers import als, closed_form, relative_error
from pgsvd_vllm.offline.linalg import gram_root, output_energy, tail_energy
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.planning.prepare import open_state
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.pareto import LossFront, loss_front
from pgsvd_vllm.offline.ranks.target import RankTarget
from pgsvd_vllm.offline.ranks.uniform import at_ratio
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import Storage

Row = dict[str, object]
Energies = dict[str, torch.Tensor]  # of `output_energies` and `loss_energies`
FORM = "factors"  # the paper's
SWEEPS = (1, 2, 4, 8, 16)
# Removed share for all questions but those of the fronts.
RATIO = 0.4
# Bars: excess error of ALS over the exact optimum at its own stop and after more sweeps, its largest rise of the error
# between two sweeps, and the distance of the removed share from the requested one.
STOP_BAR, LONG_BAR, RISE_BAR, RATIO_BAR = 0.005, 0.001, 1e-9, 0.005


def of_form(form: str) -> RankTarget:
    """What a front of sizes in a form is of."""
    return RankTarget(None, None, (Storage(form),))


def multiple(allocation: Allocation, energies: Energies, front: LossFront) -> float:
    """Loss of an allocation's ranks, by the energies that the front is of, over the front's at that size."""
    paid = sum(0.5 * float(tail_energy(energies[name])[rank]) for name, rank in allocation.ranks.items())
    return paid / front.losses[front.corner(allocation.removed)]


def barred(case: str, value: float, bar: float) -> Row:
    """A row whose value may not exceed its bar."""
    return {"case": case, "value": value, "bar": bar, "ok": value <= bar}


def fronts(plan: Plan, energies: Energies, losses: Energies) -> list[Row]:
    """Loss of one uniform tolerance at every size as a multiple of the front's, by the surrogate and as predicted."""
    profiles = {name: error_profile(energy) for name, energy in energies.items()}
    # Half of the tail beyond r is then half the squared relative error.
    relative = {name: energy / energy.sum() for name, energy in energies.items()}
    surrogate, measured = (loss_front(plan.projections.flat, e, of_form(FORM)) for e in (relative, losses))
    rows: list[Row] = []
    for ratio in RATIOS:
        uniform = at_ratio(plan.projections.flat, profiles, ratio, storage=Storage(FORM))
        distance = abs(uniform.removed - ratio)
        rows.append(barred(f"one tolerance, {ratio:.0%}, distance of the removed share", distance, RATIO_BAR))
        for what, front, values in (("squared errors", surrogate, relative), ("measured loss", measured, losses)):
            value = multiple(uniform, values, front)
            rows.append({"case": f"one tolerance, {what}, {ratio:.0%}, multiple of the front", "value": value})
    return rows


def without_gradients(plan: Plan, energies: Energies, losses: Energies) -> list[Row]:
    """Measured loss of the ranks that forward passes alone would choose, as a multiple of the front's."""
    batches, settings = text_batches(plan.data.windows.ids[::32]), plan.settings
    stream = LayerStream(plan.source, batches, settings.device, settings.compute_dtype)
    guessed = {}
    for index, row in enumerate(plan.projections.layers):
        moved = noise_responses(stream, index, row, plan.options.seed)
        list(advance(stream, index, row, collect=False))
        guessed.update({p.name: energies[p.name] * moved[p.name] for p in row})
    front, crude = (loss_front(plan.projections.flat, energies, of_form("pivot")) for energies in (losses, guessed))
    rows: list[Row] = []
    for ratio in RATIOS:
        value = multiple(crude.at(ratio), losses, front)
        rows.append({"case": f"ranks by forward passes, {ratio:.0%}, multiple of the front", "value": value})
    return rows


def solvers(plan: Plan, state: RunState, energies: Energies, every: int) -> list[Row]:
    """Excess error and seconds of ALS beside the exact solution, over every n-th projection."""
    profiles = {name: error_profile(values) for name, values in energies.items()}
    ranks = at_ratio(plan.projections.flat, profiles, RATIO, storage=Storage(FORM)).ranks
    picked = [p.name for p in plan.projections.flat if p.name in ranks][::every]
    excess: dict[int, list[float]] = {n: [] for n in SWEEPS}
    exact_seconds = als_seconds = 0.0
    stop = long = rise = 0.0
    for index, row in enumerate(plan.projections.layers):
        data = state.load_layer(index)
        for p in row:
            if p.name not in picked:
                continue
            weight = plan.source.weights.read(f"{p.name}.weight").double()
            gram, rank = data.grams[data.leader[p.name]].double(), ranks[p.name]
            start = time.perf_counter()
            optimum = closed_form(weight, gram, rank).errors[-1]
            exact_seconds += time.perf_counter() - start
            start = time.perf_counter()
            errors = als(weight, gram, rank, optimum, tolerance=0.0, max_sweeps=max(SWEEPS)).errors
            als_seconds += time.perf_counter() - start
            for n in SWEEPS:
                excess[n].append(errors[min(n, len(errors) - 1)] / optimum - 1)
            certificate = float(profiles[p.name][rank])
            found = als(weight, gram, rank, certificate)
            more = als(weight, gram, rank, certificate, tolerance=LONG_BAR)
            stop = max(stop, relative_error(weight, gram, found.u @ found.v) / optimum - 1)
            long = max(long, relative_error(weight, gram, more.u @ more.v) / optimum - 1)
            rise = max(rise, *(b - a for a, b in pairwise(more.errors)), 0.0)
    rows: list[Row] = [
        {"case": f"ALS, {n} sweeps, mean excess error over {len(picked)} projections", "value": sum(e) / len(e)}
        for n, e in excess.items()
    ]
    rows.append({"case": "exact solution, seconds", "value": exact_seconds})
    rows.append({"case": f"ALS, {max(SWEEPS)} sweeps, seconds", "value": als_seconds})
    rows.append(barred("ALS, excess error at its own stop, worst", stop, STOP_BAR))
    rows.append(barred("ALS, excess error after more sweeps, worst", long, LONG_BAR))
    rows.append(barred("ALS, largest rise of the error between sweeps", rise, RISE_BAR))
    return rows


def sensitivities(plan: Plan, energies: Energies, losses: Energies) -> list[Row]:
    """By kind of projection: predicted loss of a relative error of 10 %, error at half rank and at the optimum."""
    ranks = loss_front(plan.projections.flat, losses, plan.target).at(RATIO).ranks
    price: dict[str, list[float]] = {}
    allowed: dict[str, list[float]] = {}
    half: dict[str, list[float]] = {}
    for p in plan.projections.flat:
        kind = p.name.rsplit(".", 1)[-1]
        price.setdefault(kind, []).append(0.5 * float(losses[p.name].sum()) * 0.01)
        profile = error_profile(energies[p.name])
        half.setdefault(kind, []).append(float(profile[min(p.out_features, p.in_features) // 2]))
        allowed.setdefault(kind, []).append(float(profile[ranks[p.name]]) if p.name in ranks else 0.0)
    rows: list[Row] = []
    for kind in price:
        count = len(price[kind])
        rows.append({"case": f"{kind}: nats for an error of 10 %, mean", "value": sum(price[kind]) / count})
        rows.append({"case": f"{kind}: error at half of the full rank, mean", "value": sum(half[kind]) / count})
        rows.append({"case": f"{kind}: error at {RATIO:.0%} removed, mean", "value": sum(allowed[kind]) / count})
    return rows


def sharing(plan: Plan, state: RunState) -> list[Row]:
    """Predicted loss of the best ranks where q, k, v, or gate and up, share one down factor, as a multiple of apart."""
    tokens = plan.data.windows.ids.numel()
    apart: dict[str, torch.Tensor] = {}
    together: dict[str, tuple[list[Projection], torch.Tensor]] = {}
    for index, row in enumerate(plan.projections.layers):
        data = state.load_layer(index)
        sensitivity = state.load_sensitivity(index, plan.settings.sensitivity)
        apart.update(sensitivity.energy)
        for leader, gram in data.grams.items():
            group = [p for p in row if data.leader[p.name] == leader]
            if len(group) > 1:
                # One second moment of the shared inputs, for both sides of the comparison.
                inputs = sum(
                    weighted_gram(gram.double(), tokens, sensitivity.grams[p.name].double()) for p in group
                ) / len(group)
                root = gram_root(inputs)
                targets = {
                    p.name: metric_root(sensitivity.moments[p.name].double()).T
                    @ plan.source.weights.read(f"{p.name}.weight").double()
                    for p in group
                }
                apart.update({name: output_energy(target, inputs, root) for name, target in targets.items()})
                half = torch.cat(list(targets.values())) @ root
                energy = torch.linalg.eigvalsh(half.T @ half).flip(0).clamp_min(0)
                together[leader] = group, energy
    rows: list[Row] = []
    for form in ("factors", "pivot"):
        shared = {p.name for group, _ in together.values() for p in group}
        joint = [
            Projection(name, sum(p.out_features for p in g), g[0].in_features) for name, (g, _) in together.items()
        ]
        energies = {name: energy for name, energy in apart.items() if name not in shared}
        energies |= {name: energy for name, (_, energy) in together.items()}
        separate = loss_front(plan.projections.flat, apart, of_form(form))
        others = [p for p in plan.projections.flat if p.name not in shared]
        joined = loss_front(others + joint, energies, of_form(form))
        for ratio in (0.2, RATIO):
            pair = [front.losses[front.corner(ratio)] for front in (joined, separate)]
            rows.append(
                {"case": f"one down factor a group, {form}, {ratio:.0%}, multiple of apart", "value": pair[0] / pair[1]}
            )
    return rows


def main() -> int:
    """Measure, print, write JSON and Markdown; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR", help="has wiki.valid.raw")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--kinds", action="store_true", help="only how much each kind of projection matters")
    parser.add_argument("--quick", action="store_true", help="solve every tenth projection instead of every second")
    parser.add_argument("--work", type=Path, help="kept between runs (default: quality.py's)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    plan = quality_plan(arguments.wikitext, arguments.work, model=arguments.model)
    state = open_state(plan)
    calibrate(plan, state)
    spectra = measured_spectra(plan, state)
    assert spectra.loss is not None
    energies, losses = spectra.output, spectra.loss
    rows: list[Row] = []
    if not arguments.kinds:
        rows += fronts(plan, energies, losses) + without_gradients(plan, energies, losses)
        rows += solvers(plan, state, energies, 10 if arguments.quick else 2)
        rows += sharing(plan, state)
    rows += sensitivities(plan, energies, losses)
    text = "| | |\n|---|---|\n" + "".join(f"| {row['case']} | {row['value']:.4g} |\n" for row in rows)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json:
        table = [{"bar": None, "ok": True} | row for row in rows]
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:
        sys.exit(f"paper_claims.py: error: {problem}")
