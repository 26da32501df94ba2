"""Experts of mixtures and projectors: how many tokens of the calibration data reach each, and which of them too few."""

import statistics
from collections.abc import Callable
from dataclasses import replace

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.towers import PROJECTOR
from pgsvd_vllm.offline.run.plan import Plan
from pgsvd_vllm.offline.run.state import RunState

# Projections named in the warning.
SHOWN = 3


def token_counts(plan: Plan, workspace: RunState) -> dict[str, int]:
    """Projection that may be `scarce` of tokens -> those of the calibration data that reached it."""
    found = {}
    for index, row in enumerate(plan.projections):
        scarce = [p for p in row if p.scarce]
        if not scarce:
            continue
        data = workspace.load_layer(index, with_grams=False)
        for p in scarce:
            leader = data.leader.get(p.name)
            found[p.name] = 0 if leader is None else data.counts[leader]
    return found


def leave_uncovered_dense(plan: Plan, workspace: RunState, tokens: dict[str, int], say: Callable[[str], None]) -> Plan:
    """The plan without the matrices that too few tokens reach: they stay dense, and count as kept.

    Too few are fewer than the projection has inputs, so that its Gram matrix has not full rank.

    Args:
        plan, workspace: calibrated.
        tokens: of `token_counts`.
        say: called with a line about the experts' tokens, and with one about what stays dense.

    Raises:
        InputError: a ratio or tolerance of its own was asked for a tower of which nothing is left.
    """
    if not tokens:
        return plan
    counts = sorted(tokens[p.name] for p in plan.flat if p.reach < 1)
    if counts:
        say(f"tokens per expert: {counts[0]} to {counts[-1]}, median {statistics.median_low(counts)}")
    known = set()
    for index in range(len(plan.projections)):
        data = workspace.load_layer(index, with_grams=False)
        measured = workspace.load_sensitivity(index, plan.sensitivity, with_matrices=False) if plan.measured else data
        known |= data.energy.keys() & measured.energy.keys()
    starved = [p for p in plan.flat if p.scarce and p.name not in known]
    if not starved:
        return plan
    left = replace(
        plan,
        projections=[[p for p in row if p not in starved] for row in plan.projections],
        ignored=[*plan.ignored, *starved],
    )
    lost = set(plan.towers) - set(left.towers)
    shown = ", ".join(f"{p.name} ({tokens[p.name]} of {p.in_features})" for p in starved[:SHOWN])
    more = f" and {len(starved) - SHOWN} more" if len(starved) > SHOWN else ""
    reason = f"too few tokens reach them (a projection needs as many as it has inputs): {shown}{more}"
    for option, shares in (("--ratio", plan.options.ratio), ("--tolerance", plan.options.tolerance)):
        for tower in lost.intersection(shares if isinstance(shares, dict) else ()):
            raise InputError(
                f"{option} {tower}=...: all its matrices must stay dense, since {reason}; leave {tower} out, or start "
                "anew with more --num-calibration-samples"
            )
    kinds = sorted({"the projector" if p.tower == PROJECTOR else "experts" for p in starved})
    say(
        f"WARNING: {len(starved)} matrices of {' and '.join(kinds)} stay dense, since {reason}; more "
        "--num-calibration-samples may help"
    )
    return left
