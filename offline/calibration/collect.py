"""Runs the calibration of all layers and saves Gram matrices, spectra and sensitivities in the run's state."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gradients import GradientPass, LayerGradients
from pgsvd_vllm.offline.calibration.gram import LayerGrams, advance
from pgsvd_vllm.offline.calibration.lm_head import calibrate_lm_head
from pgsvd_vllm.offline.calibration.loss_metric import metric_root, weighted_gram
from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.linalg import ScaledMatrix, gram_root, is_silent, naming, output_energy
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet, widest
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.records import LayerCalibration, LayerSensitivity
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import FORWARD, MEASURED, RunSettings


@dataclass(frozen=True)
class Calibration:
    """The calibration of one run.

    Attributes:
        source: the model.
        data: the calibration set.
        settings: of the run.
        projections: to calibrate.
        state: that holds the results.
    """

    source: ModelSource
    data: CalibrationSet
    settings: RunSettings
    projections: ProjectionSet
    state: RunState

    def run(self) -> None:
        """Compute Gram matrices, output spectra and sensitivities of every layer that the state does not hold yet.

        Raises:
            InputError: too few tokens, an activation or gradient overflows, or the model never calls a projection.
        """
        state, kind, head = self.state, self.settings.sensitivity, self.projections.lm_head
        layers = range(len(self.projections.layers))
        missing = [i for i in layers if self.settings.measured and not state.has_sensitivity(i, kind)]
        done = all(state.has_layer(i) for i in layers) and (head is None or state.has_lm_head())
        if done and not missing:
            return
        state.begin_calibration()
        stream = LayerStream(self.source, self.data.batches(), self.settings.device, self.settings.compute_dtype)
        gradients = GradientPass(stream, state.folder / "inputs") if missing and kind == MEASURED else None
        with tqdm(total=self._tokens_of_all_layers(), unit="tok", unit_scale=True, desc="calibrate") as bar:
            for index in layers:
                bar.set_postfix_str(f"layer {index + 1}/{len(layers)}", refresh=False)
                stream.enter(index, stream.flow)
                if gradients is not None:
                    gradients.remember(index)
                self._collect(stream, index, kind == FORWARD and index in missing, bar)
        if head is not None and not state.has_lm_head():
            state.save_lm_head(calibrate_lm_head(stream, head))
        if gradients is not None:
            self._backward(gradients)

    def _tokens_of_all_layers(self) -> int:
        """Tokens of one forward pass, counted once per layer."""
        return sum(len(tower.layers) * self.data.tokens_of(tower.name) for tower in self.source.towers)

    def _collect(self, stream: LayerStream, index: int, with_noise: bool, bar: tqdm) -> None:
        """Run one layer forward; `with_noise` measures its noise responses as well."""
        row, state = self.projections.layers[index], self.state
        collect = bool(row) and not state.has_layer(index)
        responses = noise_responses(stream, index, row, self.settings.seed) if with_noise else {}
        for step in advance(stream, index, row, collect):
            if isinstance(step, LayerGrams):
                self._check_tokens(row, step.tokens)
                state.save_layer(index, self._spectra(row, step))
            else:
                bar.update(step)
        if not row and not state.has_layer(index):
            state.save_layer(index, LayerCalibration({}, {}, {}, 0, {}))
        if with_noise:
            data = state.load_layer(index, with_grams=False)
            scaled = {
                name: energy * (responses[name] / data.tokens)
                for name, energy in data.energy.items()
                # A nonzero projection without response is silent; a zero one is exact at any rank.
                if name in responses and (responses[name] > 0 or not energy.any())
            }
            state.save_sensitivity(index, FORWARD, LayerSensitivity({}, {}, scaled))

    def _check_tokens(self, row: list[Projection], tokens: int) -> None:
        """Refuse fewer tokens than a projection has inputs: its Gram matrix would lack full rank."""
        most = widest([p for p in row if not p.may_lack_tokens])
        if most is not None and tokens < most.in_features:
            raise InputError(
                f"`dataset` {self.data.name}: {tokens} tokens of the {most.tower} model are too few; "
                f"{most.name} has {most.in_features} inputs and needs at least as many"
            )

    def _spectra(self, row: list[Projection], found: LayerGrams) -> LayerCalibration:
        """A layer's calibration, with the output spectra of all projections that enough tokens reach.

        Nonzero projections whose output is zero have no spectrum, since the data says nothing about them.
        The weights are read one at a time, since those of a large layer may not fit into memory together. The Gram
        matrices of `found` are taken out.
        """
        roots: dict[str, torch.Tensor] = {}
        energy = {}
        for p in row:
            name = found.leader.get(p.name, "")
            if p.may_lack_tokens and found.counts.get(name, 0) < p.in_features:
                continue
            gram = found.grams[name].to(self.settings.device).double()
            weight = self.source.weights.tensor(f"{p.path}.weight").to(self.settings.device)
            with naming(p.name):
                if p.out_features > p.in_features and name not in roots:
                    roots[name] = gram_root(gram)
                spectrum = output_energy(weight, gram, roots.get(name))
            if not is_silent(float(weight.double().square().sum()), gram, spectrum):
                energy[p.name] = spectrum.cpu()
        used = {found.leader[name] for name in energy}
        roots.clear()
        # One after the other: those of a layer of MoE experts take GBs.
        grams = {name: ScaledMatrix.of(found.grams.pop(name)) for name in list(found.grams) if name in used}
        return LayerCalibration(grams, found.leader, energy, found.tokens, found.counts)

    def _backward(self, gradients: GradientPass) -> None:
        """Run the backward pass and save gradient moments and loss spectra of every layer."""
        rows = self.projections.layers
        share = gradients.batches / len(gradients.stream.batches)
        total = round(share * self._tokens_of_all_layers())
        # Predictions take as long as several layers where the vocabulary is large.
        head = gradients.text_tokens
        with tqdm(total=head + total, unit="tok", unit_scale=True, desc="gradients") as bar:
            bar.set_postfix_str("predictions", refresh=False)
            gradients.start(self.settings.seed, bar.update)
            bar.update(head - bar.n)
            for index in reversed(range(len(rows))):
                bar.set_postfix_str(f"layer {index + 1}/{len(rows)}", refresh=False)
                known = self.state.load_layer(index, with_grams=False).energy
                for step in gradients.retreat(index, [p for p in rows[index] if p.name in known]):
                    if isinstance(step, int):
                        bar.update(step)
                    else:
                        self.state.save_sensitivity(index, MEASURED, self._loss_spectra(index, step))

    def _loss_spectra(self, index: int, found: LayerGradients) -> LayerSensitivity:
        """Eigenvalues of L^T W C W^T L of a layer's projections: twice the loss of removing each direction, in nats.

        Args:
            index: of the layer.
            found: its gradient moments; they are taken out one by one.
        """
        data, device = self.state.load_layer(index), self.settings.device
        energy, moments, grams = {}, {}, {}
        for p in self.projections.layers[index]:
            # Taken out: in float64 those of a whole layer have several times the bytes of its weights.
            moment, weighted = found.moments.pop(p.name, None), found.grams.pop(p.name, None)
            # Without gradient only a zero projection has a known loss, which is 0 at any rank.
            if moment is None or weighted is None or not (moment.any() or not data.energy[p.name].any()):
                continue
            gram = data.grams[data.leader[p.name]].double(device)
            gram = weighted_gram(gram, data.tokens, weighted)
            weight = self.source.weights.tensor(f"{p.path}.weight").to(device).double()
            with naming(p.name):
                energy[p.name] = output_energy(metric_root(moment).T @ weight, gram).cpu()
            moments[p.name], grams[p.name] = ScaledMatrix.of(moment), ScaledMatrix.of(weighted)
        return LayerSensitivity(moments, grams, energy)


def output_energies(state: RunState, layers: int) -> dict[str, torch.Tensor]:
    """Read the output spectra of all layers from the state.

    Args:
        state: of a calibrated run.
        layers: number of layers.

    Returns:
        projection -> eigenvalues of W C W^T, float64 [min(out, in)], descending.

    Raises:
        InputError: a file of the state is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for index in range(layers):
        found.update(state.load_layer(index, with_grams=False).energy)
    return found


def loss_energies(state: RunState, layers: int, sensitivity: str) -> dict[str, torch.Tensor]:
    """Read the loss spectra of all layers from the state.

    Args:
        state: of a calibrated run.
        layers: number of layers.
        sensitivity: `measured` or `forward`.

    Returns:
        projection -> twice the predicted loss of removing each direction, float64 [min(out, in)], descending; see
        `LayerSensitivity.energy` for the units.

    Raises:
        InputError: a file of the state is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for index in range(layers):
        found.update(state.load_sensitivity(index, sensitivity, with_matrices=False).energy)
    return found
