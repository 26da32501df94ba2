"""A calibrated model with its spectra, and what several questions compute from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pgsvd_vllm.offline.compress import measured_spectra
from pgsvd_vllm.offline.linalg import tail_energy
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.ranks.allocation import Allocation
from pgsvd_vllm.offline.ranks.error_profile import error_profile
from pgsvd_vllm.offline.ranks.pareto import LossFront, loss_front
from pgsvd_vllm.offline.ranks.target import RankTarget
from pgsvd_vllm.offline.ranks.uniform import at_ratio
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import Storage

Say = Callable[[str], None]
Energies = Mapping[str, torch.Tensor]
# The form of the paper, which the questions use where the form is not what they ask about.
FORM = "factors"


@dataclass(frozen=True)
class Study:
    """A calibrated model.

    Attributes:
        plan: of the model, without projections that too few tokens reach; sensitivities are measured by gradients.
        state: of the run, with the calibration.
        output: projection -> eigenvalues of W C W^T, float64 [min(out, in)], descending.
        loss: projection -> twice the predicted loss of removing each direction in nats per token, float64
            [min(out, in)], descending.
        ratios: removed shares, ascending, for questions about the front.
        ratio: removed share for the other questions.
        every: the solvers are compared on every n-th projection.
        say: called with progress lines.
    """

    plan: Plan
    state: RunState
    output: Energies
    loss: Energies
    ratios: tuple[float, ...]
    ratio: float
    every: int
    say: Say

    @property
    def projections(self) -> list[Projection]:
        """The projections that may be factored."""
        return self.plan.projections.flat

    @property
    def profiles(self) -> dict[str, torch.Tensor]:
        """The error profile of each projection, float64 [min(out, in) + 1]."""
        return {name: error_profile(energy) for name, energy in self.output.items()}

    def uniform(self, ratio: float) -> Allocation:
        """The ranks of one uniform tolerance that remove the share closest to `ratio`; raises ChoiceError."""
        ignored = self.plan.projections.ignored_numel
        return at_ratio(self.projections, self.profiles, ratio, ignored, Storage(FORM))

    def front(self, energies: Energies, form: str = FORM, of: Sequence[Projection] | None = None) -> LossFront:
        """The Pareto front of size and loss.

        Args:
            energies: of each projection, as of `loss_front`.
            form: of the low-rank matrices.
            of: projections in place of those of the plan.
        """
        target = RankTarget(None, None, (Storage(form),))
        return loss_front(self.projections if of is None else of, energies, target, self.plan.projections.ignored)

    def weight(self, projection: Projection) -> torch.Tensor:
        """The dense weight of a projection, float64 [out, in], on the device of the run."""
        return self.plan.source.weights.tensor(f"{projection.path}.weight").to(self.plan.settings.device).double()


def study_of(plan: Plan, state: RunState, ratios: tuple[float, ...], ratio: float, every: int, say: Say) -> Study:
    """The study of a calibrated run; arguments as of `Study`.

    Raises:
        InputError: a file of the state is damaged.
    """
    spectra = measured_spectra(plan, state)
    assert spectra.loss is not None
    names = [p.name for p in plan.projections.flat]
    output, loss = ({name: found[name] for name in names} for found in (spectra.output, spectra.loss))
    return Study(plan, state, output, loss, ratios, ratio, every, say)


def multiple(allocation: Allocation, energies: Energies, front: LossFront) -> float | None:
    """The loss of an allocation's ranks as a multiple of the front's at the same size; None where that is 0.

    Args:
        allocation: of ranks.
        energies: that the front is of.
        front: of the same projections.
    """
    paid = sum(0.5 * float(tail_energy(energies[name])[rank]) for name, rank in allocation.ranks.items())
    least = front.losses[front.corner(allocation.removed)]
    return paid / least if least > 0 else None
