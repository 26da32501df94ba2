"""Runs the calibration of all layers and saves Gram matrices, spectra and sensitivities in the run's state."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gradients import GradientSums, gradient_batches
from pgsvd_vllm.offline.calibration.gram import LayerGrams
from pgsvd_vllm.offline.calibration.lm_head import HeadSums, head_batches, lm_head_calibration
from pgsvd_vllm.offline.calibration.loss import contrastive_gradients
from pgsvd_vllm.offline.calibration.shard import CalibrationShard
from pgsvd_vllm.offline.calibration.spectra import LossSpectrum, loss_spectrum, output_spectra
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.executor.executor import Executor, combined
from pgsvd_vllm.offline.model.batch import Batch
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
        executor: that runs the samples.
    """

    source: ModelSource
    data: CalibrationSet
    settings: RunSettings
    projections: ProjectionSet
    state: RunState
    executor: Executor

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
        batches = self.data.batches()
        inputs = state.folder / "inputs" if self.executor.is_local else None
        self.executor.begin(CalibrationShard, batches, inputs)
        with_gradients = bool(missing) and kind == MEASURED
        taken: set[int] = set()
        if with_gradients:
            tokens = {number: n for part in self.executor.call("batch_tokens") for number, n in part.items()}
            taken = gradient_batches(tokens)
            self.executor.call("measure_gradients", taken)
        with tqdm(total=self._tokens_of_all_layers(), unit="tok", unit_scale=True, desc="calibrate") as bar:
            for index in layers:
                bar.set_postfix_str(f"layer {index + 1}/{len(layers)}", refresh=False)
                self._collect(index, kind == FORWARD and index in missing, bar)
        if head is not None and not state.has_lm_head():
            streams = self.executor.streams("run_lm_head", head, head_batches(batches))
            *_, found = combined(streams, HeadSums())
            assert isinstance(found, HeadSums)
            state.save_lm_head(lm_head_calibration(self.source, head, found))
        if with_gradients:
            self._backward([batches[number] for number in taken], len(taken) / len(batches))

    def _tokens_of_all_layers(self) -> int:
        """Tokens of one forward pass, counted once per layer."""
        return sum(len(tower.layers) * self.data.tokens_of(tower.name) for tower in self.source.towers)

    def _collect(self, index: int, with_noise: bool, bar: tqdm) -> None:
        """Run one layer forward; `with_noise` measures its noise responses as well."""
        row, state = self.projections.layers[index], self.state
        collect = bool(row) and not state.has_layer(index)
        # Of the first batch.
        responses = self.executor.call("noise", index, row, self.settings.seed)[0] if with_noise else {}
        for step in combined(self.executor.streams("advance", index, row, collect), LayerGrams()):
            if isinstance(step, int):
                bar.update(step)
            elif collect:
                step.check_called(row)
                self._check_tokens(row, step.tokens)
                state.save_layer(index, self._spectra(row, step))
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
        """
        groups: dict[str, list[Projection]] = {}
        for p in row:
            name = found.leader.get(p.name, "")
            if not p.may_lack_tokens or found.counts.get(name, 0) >= p.in_features:
                groups.setdefault(name, []).append(p)
        # One after the other: those of a layer of MoE experts take GBs.
        items = ((group, found.sums.pop(name)) for name, group in groups.items())
        grams, energy = {}, {}
        for name, (gram, spectra) in zip(groups, self.executor.map(output_spectra, items), strict=True):
            energy.update(spectra)
            if spectra:
                grams[name] = gram
        order = {p.name: energy[p.name] for p in row if p.name in energy}
        return LayerCalibration(grams, found.leader, order, found.tokens, dict(found.counts))

    def _backward(self, batches: Sequence[Batch], share: float) -> None:
        """Run the backward pass and save gradient moments and loss spectra of every layer.

        Args:
            batches: that take part.
            share: of all batches.
        """
        rows, seed = self.projections.layers, self.settings.seed
        total = round(share * self._tokens_of_all_layers())
        # Predictions take as long as several layers where the vocabulary is large.
        head = sum(batch["input_ids"].numel() for batch in batches)
        with tqdm(total=head + total, unit="tok", unit_scale=True, desc="gradients") as bar:
            bar.set_postfix_str("predictions", refresh=False)
            if self.source.is_dual_encoder:
                start_contrastive(self.executor, self.source, seed)
            else:
                for tokens in itertools.chain(*self.executor.streams("start", seed)):
                    bar.update(tokens)
            bar.update(head - bar.n)
            losses = sum(self.executor.call("losses"))
            for index in reversed(range(len(rows))):
                bar.set_postfix_str(f"layer {index + 1}/{len(rows)}", refresh=False)
                known = self.state.load_layer(index, with_grams=False).energy
                row = [p for p in rows[index] if p.name in known]
                for step in combined(self.executor.streams("retreat", index, row), GradientSums()):
                    if isinstance(step, int):
                        bar.update(step)
                    else:
                        self.state.save_sensitivity(index, MEASURED, self._loss_spectra(index, step, losses))

    def _loss_spectra(self, index: int, found: GradientSums, losses: int) -> LayerSensitivity:
        """Eigenvalues of L^T W C W^T L of a layer's projections: twice the loss of removing each direction, in nats.

        Args:
            index: of the layer.
            found: its sums; they are taken out one by one.
            losses: number of loss terms.
        """
        data = self.state.load_layer(index)
        reached = found.reached([p for p in self.projections.layers[index] if p.name in data.energy])
        items = (
            LossSpectrum(
                p,
                data.grams[data.leader[p.name]],
                data.tokens,
                found.sums.pop(p.name),
                found.tokens,
                losses,
                not data.energy[p.name].any(),
            )
            for p in reached
        )
        energy, moments, grams = {}, {}, {}
        for p, spectrum in zip(reached, self.executor.map(loss_spectrum, items), strict=True):
            if spectrum is not None:
                energy[p.name], moments[p.name], grams[p.name] = spectrum
        return LayerSensitivity(moments, grams, energy)


def start_contrastive(executor: Executor, source: ModelSource, seed: int) -> None:
    """Start the backward pass of a dual encoder, whose loss is over all pairs.

    Args:
        executor: whose calibration shards have run all layers.
        source: the model.
        seed: of the draw of labels.

    Raises:
        InputError: a gradient or a prediction is not finite.
    """
    embeddings = {number: pair for part in executor.call("embed") for number, pair in part.items()}
    numbers = sorted(embeddings)
    texts, images = (torch.cat([embeddings[number][i] for number in numbers]) for i in range(2))
    sizes = [len(embeddings[number][0]) for number in numbers]
    parts = (part.split(sizes) for part in contrastive_gradients(source, (texts, images), seed))
    executor.call("start_from", dict(zip(numbers, zip(*parts, strict=True), strict=True)))


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
