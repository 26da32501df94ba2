"""Finds the projections that the calibration data says too little about, which stay dense, and counts experts' tokens.

A projection needs as many tokens as it has inputs; with fewer its Gram matrix lacks full rank. If its outputs are 0 on
all tokens, or with measured sensitivities no loss depends on them, factors of any content would seem exact. A zero
projection is exact at rank 1 and needs no data.
"""

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.towers import PROJECTOR
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings

# Why projections stay dense.
FEW_TOKENS = "too few tokens reach them (a projection needs as many as it has inputs)"
NO_OUTPUT = "their outputs are 0 on the calibration data"
NO_LOSS = "the loss does not depend on them on the calibration data"
# Projections named for each reason.
SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """How the calibration data covers a run's projections.

    Attributes:
        tokens: projection of an MoE expert or projector -> calibration tokens that reach it.
        uncovered: reason -> the projections that stay dense for it.
    """

    tokens: dict[str, int]
    uncovered: dict[str, list[Projection]]

    def leave_dense(self, projections: ProjectionSet, say: Callable[[str], None]) -> ProjectionSet:
        """The set with uncovered projections moved to the ignored ones.

        Args:
            projections: calibrated.
            say: called with one line about the MoE experts' tokens and one for each reason.

        Raises:
            InputError: no projection is left.
        """
        counts = sorted(self.tokens[p.name] for p in projections.flat if p.reach < 1)
        if counts:
            say(f"tokens per MoE expert: {counts[0]} to {counts[-1]}, median {statistics.median_low(counts)}")
        for reason, dense in self.uncovered.items():
            kinds = sorted({"the projector" if p.tower == PROJECTOR else "MoE experts" for p in dense})
            of = f" of {' and '.join(kinds)}" if reason == FEW_TOKENS else ""
            more = "; more `num_calibration_samples` may help" if reason == FEW_TOKENS else ""
            say(f"WARNING: {len(dense)} projections{of} stay dense, since {self._because(reason, dense)}{more}")
        left = projections.kept_dense([p for dense in self.uncovered.values() for p in dense])
        if not left.flat:
            reasons = "; ".join(self._because(reason, dense) for reason, dense in self.uncovered.items())
            raise InputError(
                f"`dataset`: all projections would stay dense, since {reasons}; check the model and the text"
            )
        return left

    def check_towers_left(self, left: ProjectionSet, requested: Collection[str], option: str) -> None:
        """Refuse a ratio or tolerance for a tower whose projections all stay dense.

        Args:
            left: from `leave_dense`.
            requested: towers that the option names.
            option: name of the option's field, `ratio` or `tolerance`.

        Raises:
            InputError: names the option and the tower.
        """
        for tower in sorted(set(requested) - set(left.towers)):
            rows = {reason: [p for p in dense if p.tower == tower] for reason, dense in self.uncovered.items()}
            reasons = "; ".join(self._because(reason, dense) for reason, dense in rows.items() if dense)
            raise InputError(
                f"`{option}` {tower}=...: all its projections stay dense, since {reasons}; omit "
                f"{tower}, or start a new run with more `num_calibration_samples`"
            )

    def _because(self, reason: str, dense: list[Projection]) -> str:
        """A reason with the names, and where they decide the token counts, of the first projections."""
        few = reason == FEW_TOKENS
        shown = (f"{p.name} ({self.tokens[p.name]} of {p.in_features})" if few else p.name for p in dense[:SHOWN])
        more = f" and {len(dense) - SHOWN} more" if len(dense) > SHOWN else ""
        return f"{reason}: {', '.join(shown)}{more}"


def find_coverage(projections: ProjectionSet, settings: RunSettings, state: RunState) -> Coverage:
    """How the data of a calibrated run covers its projections.

    Args:
        projections: to factor.
        settings: of the run.
        state: with the calibration.

    Raises:
        InputError: a file of the state is damaged.
    """
    tokens: dict[str, int] = {}
    uncovered: dict[str, list[Projection]] = {}
    for index, row in enumerate(projections.layers):
        data = state.load_layer(index, with_grams=False)
        measured = data.energy
        if settings.measured:
            measured = state.load_sensitivity(index, settings.sensitivity, with_matrices=False).energy
        for p in row:
            leader = data.leader.get(p.name)
            if p.may_lack_tokens:
                tokens[p.name] = 0 if leader is None else data.counts[leader]
            if p.may_lack_tokens and tokens[p.name] < p.in_features:
                uncovered.setdefault(FEW_TOKENS, []).append(p)
            elif p.name not in data.energy:
                uncovered.setdefault(NO_OUTPUT, []).append(p)
            elif p.name not in measured:
                uncovered.setdefault(NO_LOSS, []).append(p)
    return Coverage(tokens, uncovered)
