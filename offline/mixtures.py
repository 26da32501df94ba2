"""Experts of mixtures: how many tokens of the calibration text reach each, and which of them too few."""

import statistics
from collections.abc import Callable
from dataclasses import replace

from pgsvd_vllm.offline.plan import Plan
from pgsvd_vllm.offline.workspace import Workspace

# Projections named in the warning.
SHOWN = 3


def expert_tokens(plan: Plan, workspace: Workspace) -> dict[str, int]:
    """Projection of an expert -> tokens of the calibration data that reached it."""
    found = {}
    for index, row in enumerate(plan.projections):
        experts = [p for p in row if p.reach < 1]
        if not experts:
            continue
        data = workspace.load_layer(index, with_grams=False)
        for p in experts:
            leader = data.leader.get(p.name)
            found[p.name] = 0 if leader is None else data.counts[leader]
    return found


def leave_starved(plan: Plan, workspace: Workspace, tokens: dict[str, int], say: Callable[[str], None]) -> Plan:
    """The plan without the experts' projections that too few tokens reach: they stay dense, and count as kept.

    Too few are fewer than the projection has inputs, so that its Gram matrix has not full rank.

    Args:
        plan, workspace: calibrated.
        tokens: of `expert_tokens`.
        say: called with a line about the tokens, and with one about what stays dense.
    """
    if not tokens:
        return plan
    counts = sorted(tokens.values())
    say(f"tokens per expert: {counts[0]} to {counts[-1]}, median {statistics.median_low(counts)}")
    known = set()
    for index in range(len(plan.projections)):
        data = workspace.load_layer(index, with_grams=False)
        measured = workspace.load_sensitivity(index, plan.sensitivity, with_matrices=False) if plan.measured else data
        known |= data.energy.keys() & measured.energy.keys()
    starved = [p for p in plan.flat if p.reach < 1 and p.name not in known]
    if not starved:
        return plan
    shown = ", ".join(f"{p.name} ({tokens[p.name]} of {p.in_features})" for p in starved[:SHOWN])
    more = f" and {len(starved) - SHOWN} more" if len(starved) > SHOWN else ""
    say(
        f"WARNING: {len(starved)} of the experts' {len(tokens)} projections stay dense, since too few tokens reach "
        f"them (a projection needs as many as it has inputs): {shown}{more}; more --num-calibration-samples may help"
    )
    rows = [[p for p in row if p not in starved] for row in plan.projections]
    return replace(plan, projections=rows, ignored=[*plan.ignored, *starved])
