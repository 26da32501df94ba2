"""Factors all layers with the chosen ranks and saves the tensors of each layer in the run's state."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from tqdm.auto import tqdm

from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.format.schema import FactoredModule
from pgsvd_vllm.offline.data.calibration_set import CalibrationSet
from pgsvd_vllm.offline.executor.executor import Executor
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS, ErrorAwarePass, Target
from pgsvd_vllm.offline.factors.problem import FitProblem, solve
from pgsvd_vllm.offline.linalg import ScaledMatrix
from pgsvd_vllm.offline.model.projection import Projection, ProjectionSet
from pgsvd_vllm.offline.records import LayerCalibration, LayerFactors, ModuleReport
from pgsvd_vllm.offline.run_state import RunState
from pgsvd_vllm.offline.settings import RunSettings


def factor_layers(
    data: CalibrationSet,
    settings: RunSettings,
    projections: ProjectionSet,
    state: RunState,
    modules: Mapping[str, FactoredModule],
    executor: Executor,
) -> None:
    """Factor every projection of a table that has a rank; `state.load_factors` then returns the result.

    Layers that the state already holds for the same choice are not factored again.

    Args:
        data: the calibration set, for the error-aware fit.
        settings: of the run.
        projections: to factor.
        state: with their calibration; it receives the factors of each finished layer.
        modules: projection name -> its row of the module table, whose rank is from 1 to min(out, in).
        executor: that runs the samples and the solvers.

    Raises:
        InputError: factors are not finite in the stored dtype, activations overflow in the compute dtype, a factored
            layer calls a projection with other tokens than the dense layer, or a file of the state is damaged.
    """
    factored = {name: module for name, module in modules.items() if not module.is_dense}
    state.open_factors(
        {
            "ranks": {name: [module.rank, module.form] for name, module in factored.items()},
            "sequential": settings.sequential,
            "sensitivity": settings.sensitivity,
            "baseline": settings.baseline,
            "dtype": str(settings.store_dtype),
        }
    )
    layers = range(len(projections.layers))
    if all(state.has_factors(index) for index in layers):
        return
    error_aware = None
    if settings.sequential:
        batches = data.batches(SEQUENTIAL_TOKENS)
        complete = sum(batch["input_ids"].numel() for batch in batches) == data.tokens
        error_aware = ErrorAwarePass(
            executor, batches, settings.device, settings.compute_dtype, complete, settings.kept_tokens
        )
    with tqdm(total=len(factored), desc="factorize", unit="matrix") as bar:
        for index in layers:
            bar.set_postfix_str(f"layer {index + 1}/{len(layers)}", refresh=False)
            layer = _Layer(executor, settings, state, factored, projections.layers[index], index)
            done = state.has_factors(index)
            if error_aware is not None:
                known = {name: reconstruct(row).to(settings.compute_dtype) for name, row in layer.tensors.items()}
                for _ in error_aware.advance(index, layer.groups(), set(layer.ranked), layer.fit, known):
                    bar.update()
            elif not done:
                for _ in layer.fit(list(layer.ranked.values()), None):
                    bar.update()
            if done:
                bar.update(len(layer.tensors))
            else:
                state.save_factors(index, LayerFactors(layer.tensors, layer.reports))


class _Layer:
    """The factors of one layer; those of a finished layer are read from the state."""

    def __init__(
        self,
        executor: Executor,
        settings: RunSettings,
        state: RunState,
        modules: Mapping[str, FactoredModule],
        row: list[Projection],
        index: int,
    ) -> None:
        self.executor, self.settings, self.modules, self.row = executor, settings, modules, row
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.reports: dict[str, ModuleReport] = {}
        self.ranked = {p.name: p for p in row if p.name in modules}
        self.data: LayerCalibration = state.load_layer(index)
        self.moments: dict[str, ScaledMatrix] = {}
        self.weighted: dict[str, ScaledMatrix] = {}
        if state.has_factors(index):
            stored = state.load_factors(index)
            self.tensors, self.reports = stored.tensors, stored.reports
        elif settings.measured and self.ranked:
            found = state.load_sensitivity(index, settings.sensitivity)
            self.moments, self.weighted = found.moments, found.grams

    def groups(self) -> list[list[Projection]]:
        """The projections grouped by input, in the order in which the layer calls them."""
        called = list(self.data.leader)
        groups: dict[str, list[Projection]] = {}
        for p in sorted(self.row, key=lambda p: called.index(p.name)):
            groups.setdefault(self.data.leader[p.name], []).append(p)
        return list(groups.values())

    def fit(self, projections: Sequence[Projection], target: Target | None) -> Iterator[torch.Tensor]:
        """Factor projections and keep their tensors.

        Args:
            projections: to factor, with one input.
            target: of the error-aware fit; None for the dense weights on the dense model's inputs.

        Yields:
            The reconstructed weight of each, [out, in], in the compute dtype.

        Raises:
            InputError: factors are not finite in the stored dtype.
        """
        # Each matrix is needed once, and large.
        problems = (
            FitProblem(
                p,
                self.modules[p.name],
                self.data.grams[self.data.leader[p.name]],
                self.data.tokens,
                self.data.energy[p.name],
                self.moments.pop(p.name, None),
                self.weighted.pop(p.name, None),
            )
            for p in projections
        )
        solved = self.executor.map(solve, problems, (self.settings, target))
        for p, (tensors, report, weight) in zip(projections, solved, strict=True):
            self.tensors[p.name], self.reports[p.name] = tensors, report
            yield weight
