"""Predicts what rounding the dense weights costs in every scheme, for the choice of bits.

The loss is that of truncated directions (see `LayerSensitivity.energy`): half the energy of the weight's error in the
metric of gradients and inputs. The weights are rounded as they will be, with error compensation.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.linalg import naming
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.pareto import Rounding
from pgsvd_vllm.offline.records import LayerCalibration, LayerSensitivity
from pgsvd_vllm.offline.rounding.error_compensated import round_matrix
from pgsvd_vllm.offline.rounding.forms import damped
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings

# Files of other versions are measured again.
VERSION = 1
# Projection -> key of a scheme -> predicted loss.
Losses = dict[str, dict[str, float]]


def measure_rounding(source: ModelSource, settings: RunSettings, projections: ProjectionSet, state: RunState) -> None:
    """Round every dense weight in every scheme of the settings, and save the losses that the state does not hold yet.

    Args:
        source: the model.
        settings: of the run, with several storages and measured sensitivities.
        projections: of the run.
        state: of a calibrated run; it receives the losses of each finished layer.

    Raises:
        InputError: a projection's Gram matrix cannot be used, a file of the state is damaged, or another process uses
            the calibration folder.
    """
    kind = settings.sensitivity
    known = [state.load_rounding(index, kind) for index in range(len(projections.layers))]
    missing = [index for index, found in enumerate(known) if found is None or found["version"] != VERSION]
    if not missing:
        return
    state.begin_calibration()
    with tqdm(total=sum(len(projections.layers[index]) for index in missing), desc="try bits", unit="matrix") as bar:
        for index in missing:
            layer = _Layer(source, settings, state.load_layer(index), state.load_sensitivity(index, kind))
            losses = layer.losses(projections.layers[index])
            state.save_rounding(index, kind, {"version": VERSION, "losses": losses})
            bar.update(len(projections.layers[index]))


def rounding_losses(state: RunState, layers: int, sensitivity: str) -> Rounding:
    """Read what `measure_rounding` has saved.

    Args:
        state: of a calibrated run whose bits are chosen.
        layers: number of layers.
        sensitivity: `measured` or `forward`.

    Raises:
        InputError: a file of the state is damaged.
    """
    losses: Losses = {}
    leaders: dict[str, str] = {}
    for index in range(layers):
        found = state.load_rounding(index, sensitivity)
        assert found is not None
        losses |= found["losses"]
        leaders |= state.load_layer(index, with_grams=False).leader
    return Rounding(losses, leaders)


class _Layer:
    """The losses of one layer."""

    def __init__(
        self, source: ModelSource, settings: RunSettings, data: LayerCalibration, found: LayerSensitivity
    ) -> None:
        self.source, self.settings, self.data, self.found = source, settings, data, found

    def losses(self, row: Sequence[Projection]) -> Losses:
        """The losses of the projections whose sensitivity is known."""
        groups: dict[str, list[Projection]] = {}
        for p in row:
            if p.name in self.found.energy:
                groups.setdefault(self.data.leader[p.name], []).append(p)
        losses: Losses = {p.name: {} for group in groups.values() for p in group}
        for leader, group in groups.items():
            device = self.settings.device
            gram = self.data.grams[leader].double(device)
            weights = [self.source.weights.tensor(f"{p.path}.weight").to(device).double() for p in group]
            metrics = [self._metric(p, gram) for p in group]
            together, inputs = torch.cat(weights), damped(gram)
            for scheme in self._schemes(group[0].in_features):
                # One rounding serves all weights with the same input: its rows are independent.
                with naming(leader):
                    errors = round_matrix(together, inputs, scheme).matrix() - together
                parts = errors.split([len(weight) for weight in weights])
                for p, error, (root, metric) in zip(group, parts, metrics, strict=True):
                    error = root.T @ error
                    losses[p.name][scheme.key] = 0.5 * float(((error @ metric) * error).sum())
        return losses

    def _schemes(self, columns: int) -> list[Scheme]:
        """The schemes of weights with so many inputs."""
        schemes = (storage.scheme for storage in self.settings.storages)
        return [scheme for scheme in schemes if scheme is not None and scheme.fits(columns)]

    def _metric(self, p: Projection, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L [out, any] and M [in, in]: the loss of an error E of the weight is half the sum of (L^T E M) * (L^T E)."""
        moment = self.found.moments.get(p.name)
        if moment is not None:
            with naming(p.name):
                root = metric_root(moment.double(gram.device))
            weighted = self.found.grams[p.name].double(gram.device)
            return root, weighted_gram(gram, self.data.tokens, weighted)
        # Forward passes give each projection one factor.
        total = float(self.data.energy[p.name].sum())
        factor = float(self.found.energy[p.name].sum()) / total if total > 0 else 0.0
        return torch.eye(p.out_features, dtype=gram.dtype, device=gram.device), factor * gram
