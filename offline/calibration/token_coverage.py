"""Counts the calibration tokens of MoE experts and projectors, and keeps those dense that too few tokens reach."""

import statistics
from collections.abc import Callable, Collection

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.towers import PROJECTOR
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings

# Projections named in the warning.
SHOWN = 3


def token_counts(projections: ProjectionSet, state: RunState) -> dict[str, int]:
    """Read token counts from the state.

    Returns:
        projection of an MoE expert or projector -> calibration tokens that reach it.

    Raises:
        InputError: a file of the state is damaged.
    """
    found = {}
    for index, row in enumerate(projections.layers):
        candidates = [p for p in row if p.may_lack_tokens]
        if not candidates:
            continue
        data = state.load_layer(index, with_grams=False)
        for p in candidates:
            leader = data.leader.get(p.name)
            found[p.name] = 0 if leader is None else data.counts[leader]
    return found


def leave_uncovered_dense(
    projections: ProjectionSet,
    settings: RunSettings,
    state: RunState,
    tokens: dict[str, int],
    say: Callable[[str], None],
) -> ProjectionSet:
    """The set with projections that too few tokens reach moved to the ignored ones, which stay dense.

    A projection needs as many tokens as it has inputs; with fewer its Gram matrix lacks full rank.

    Args:
        projections: calibrated.
        settings: of the run.
        state: with the calibration.
        tokens: from `token_counts`.
        say: called with one line about the MoE experts' tokens and one about the projections that stay dense.

    Raises:
        InputError: a file of the state is damaged.
    """
    if not tokens:
        return projections
    counts = sorted(tokens[p.name] for p in projections.flat if p.reach < 1)
    if counts:
        say(f"tokens per MoE expert: {counts[0]} to {counts[-1]}, median {statistics.median_low(counts)}")
    known: set[str] = set()
    for index in range(len(projections.layers)):
        energy = state.load_layer(index, with_grams=False).energy
        if settings.measured:
            measured = state.load_sensitivity(index, settings.sensitivity, with_matrices=False).energy
            known |= energy.keys() & measured.keys()
        else:
            known |= energy.keys()
    uncovered = [p for p in projections.flat if p.may_lack_tokens and p.name not in known]
    if not uncovered:
        return projections
    kinds = sorted({"the projector" if p.tower == PROJECTOR else "MoE experts" for p in uncovered})
    say(
        f"WARNING: {len(uncovered)} projections of {' and '.join(kinds)} stay dense, since "
        f"{_reason(uncovered, tokens)}; more `num_calibration_samples` may help"
    )
    return projections.kept_dense(uncovered)


def check_towers_left(left: ProjectionSet, requested: Collection[str], option: str, tokens: dict[str, int]) -> None:
    """Refuse a ratio or tolerance for a tower whose projections all stay dense.

    Args:
        left: from `leave_uncovered_dense`.
        requested: towers that the option names.
        option: name of the option's field, `ratio` or `tolerance`.
        tokens: from `token_counts`.

    Raises:
        InputError: names the option and the tower.
    """
    for tower in sorted(set(requested) - set(left.towers)):
        dense = [p for p in left.ignored if p.tower == tower and p.name in tokens]
        raise InputError(
            f"`{option}` {tower}=...: all its projections stay dense, since {_reason(dense, tokens)}; omit "
            f"{tower}, or start a new run with more `num_calibration_samples`"
        )


def _reason(uncovered: list[Projection], tokens: dict[str, int]) -> str:
    """Why projections stay dense, with the names and token counts of the first ones."""
    shown = ", ".join(f"{p.name} ({tokens[p.name]} of {p.in_features})" for p in uncovered[:SHOWN])
    more = f" and {len(uncovered) - SHOWN} more" if len(uncovered) > SHOWN else ""
    return f"too few tokens reach them (a projection needs as many as it has inputs): {shown}{more}"
