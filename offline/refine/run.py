"""Runs knowledge distillation on the factors, or the quantized matrices, in the run's state and saves the result."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pgsvd_vllm.errors import as_interruption, reason_of
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.factors.solvers import relative_error
from pgsvd_vllm.offline.model.projection import ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import HELD_OUT, Dose
from pgsvd_vllm.offline.records import LayerFactors
from pgsvd_vllm.offline.refine.distill import Distiller, Tensors
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings

# Share of the distillation that trains scales after quantization, where there are factors to train before it.
SCALES_SHARE = 1 / 3

Schemes = Mapping[str, Mapping[str, Scheme]]


def doses(dose: Dose | None, modules: Mapping[str, FactoredModule]) -> tuple[Dose | None, Dose | None]:
    """The parts of an amount of distillation that train the factors, and the scales of quantized matrices.

    Scales are trained where any matrix has 4 bits; 8 bits lose next to nothing.

    Args:
        dose: of the whole run.
        modules: projection name -> its row of the module table.
    """
    if dose is None:
        return None, None
    factored = any(not module.is_dense for module in modules.values())
    coarse = any(scheme.num_bits < 8 for module in modules.values() for scheme in module.schemes.values())
    if not coarse:
        return (dose if factored else None), None
    return (dose.part(1 - SCALES_SHARE), dose.part(SCALES_SHARE)) if factored else (None, dose)


@dataclass(frozen=True)
class Distillation:
    """The knowledge distillation of one run.

    Attributes:
        source: the language model.
        data: the calibration set; the first HELD_OUT windows of its remaining text select the result.
        settings: of the run.
        projections: of the run.
        state: with the factors of every layer.
    """

    source: ModelSource
    data: CalibrationSet
    settings: RunSettings
    projections: ProjectionSet
    state: RunState

    def run(self, dose: Dose, modules: Mapping[str, FactoredModule], say: Callable[[str], None]) -> bool:
        """Train the matrices together, of quantized ones the scales; `state.load_factors` then returns the result.

        Args:
            dose: the amount.
            modules: projection name -> its row of the module table, whose schemes are those of the matrices in the
                state.
            say: called with one line at the end.

        Returns:
            Whether anything was trained. Where the default amount fails it is left out, with a warning.

        Raises:
            InputError: a file of the state is damaged, or the models' predictions are not finite.
        """
        state = self.state
        layers = [state.load_factors(index) for index in range(len(self.projections.layers))]
        text = hashlib.sha256(self.data.windows.others.numpy().tobytes()).hexdigest()
        choice = {"minutes": dose.minutes, "tokens": dose.tokens, "seed": self.settings.seed, "text": text}
        state.open_following(choice)
        if all(state.has_factors(index) for index in range(len(layers))):
            return True
        # The student's modules have the model's own names, which may differ from the checkpoint's.
        paths = {p.name: p.path for p in self.projections.flat}
        tensors: Tensors = {paths[name]: row for layer in layers for name, row in layer.tensors.items()}
        schemes = {paths[name]: module.schemes for name, module in modules.items()}
        try:
            with as_interruption():
                trained = self._trained(dose, tensors, schemes, say)
        except Exception as error:  # lack of memory, predictions that overflow, and what else transformers meets
            if not dose.by_default:
                raise
            say(f"WARNING: distillation is left out ({type(error).__name__}: {reason_of(error)})")
            state.leave_following()
            return False
        for index, layer in enumerate(layers):
            calibration = state.load_layer(index)
            reports = dict(layer.reports)
            for name in layer.tensors:
                weight = self.source.weights.tensor(f"{paths[name]}.weight").to(self.settings.device)
                gram = calibration.grams[calibration.leader[name]].double(self.settings.device)
                matrices = dequantized(trained[paths[name]], schemes.get(paths[name], {}))
                relative = relative_error(weight, gram, reconstruct(matrices).to(self.settings.device))
                reports[name] = replace(reports[name], error=relative)
            state.save_factors(index, LayerFactors({n: trained[paths[n]] for n in layer.tensors}, reports))
        return True

    def _trained(self, dose: Dose, tensors: Tensors, schemes: Schemes, say: Callable[[str], None]) -> Tensors:
        """The tensors after distillation."""
        windows, source = self.data.windows, self.source
        dense = source.whole(self.settings.device, self.settings.compute_dtype)
        # What is not trained is shared.
        student = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
        distiller = Distiller(dense, student, source.towers[0].path, tensors, schemes, source.returned[0])
        # The factors overfit the windows they were fitted to, so training starts with the remaining ones.
        text = torch.cat([windows.others[HELD_OUT:], windows.ids])
        return distiller.run(text, windows.others[:HELD_OUT], dose, self.settings.seed, say).tensors
