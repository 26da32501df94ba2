"""The part of calibration that runs samples through the dense model."""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pgsvd_vllm.offline.calibration.gradients import GradientPass, GradientSums, batch_tokens
from pgsvd_vllm.offline.calibration.gram import LayerGrams, advance
from pgsvd_vllm.offline.calibration.lm_head import HeadSums, run_lm_head
from pgsvd_vllm.offline.calibration.loss import Embeddings
from pgsvd_vllm.offline.calibration.noise_response import noise_responses
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.projection import Projection


class CalibrationShard:
    """A share of the samples during calibration.

    Args:
        stream: of the samples.
        folder: for the inputs of the layers, on the disk of this machine; None for one of its own.
    """

    def __init__(self, stream: LayerStream, folder: Path | None) -> None:
        self.stream = stream
        self._folder = folder
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._gradients: GradientPass | None = None

    def close(self) -> None:
        """Delete the inputs of the layers."""
        if self._own is not None:
            self._own.cleanup()

    def batch_tokens(self) -> dict[int, int]:
        """As `gradients.batch_tokens`."""
        return batch_tokens(self.stream)

    def measure_gradients(self, numbers: Collection[int]) -> None:
        """Keep the inputs of layers for the backward pass, of the batches with these numbers."""
        folder = self._folder
        if folder is None:
            self._own = tempfile.TemporaryDirectory(prefix="pgsvd-inputs-", ignore_cleanup_errors=True)
            folder = Path(self._own.name)
        self._gradients = GradientPass(self.stream, folder, numbers)

    def noise(self, index: int, projections: Sequence[Projection], seed: int) -> dict[str, float]:
        """As `noise_responses`, of a layer that runs next; empty without the first batch, which is measured."""
        if 0 not in self.stream.batches:
            return {}
        self.stream.enter(index, self.stream.flow)
        return noise_responses(self.stream, index, projections, seed)

    def advance(self, index: int, projections: Sequence[Projection], collect: bool) -> Iterator[int | LayerGrams]:
        """As `gram.advance`; layers are entered as well."""
        self.stream.enter(index, self.stream.flow)
        if self._gradients is not None:
            self._gradients.remember(index)
        yield from advance(self.stream, index, projections, collect)

    def run_lm_head(self, head: Projection, numbers: Collection[int]) -> Iterator[HeadSums]:
        """As `lm_head.run_lm_head`."""
        yield from run_lm_head(self.stream, head, numbers)

    @property
    def gradients(self) -> GradientPass:
        """The backward pass, after `measure_gradients`."""
        assert self._gradients is not None
        return self._gradients

    def start(self, seed: int) -> Iterator[int]:
        """As `GradientPass.start`."""
        yield from self.gradients.start(seed)

    def embed(self) -> dict[int, Embeddings]:
        """As `GradientPass.embed`."""
        return self.gradients.embed()

    def start_from(self, gradients: Mapping[int, Embeddings]) -> None:
        """As `GradientPass.start_from`."""
        self.gradients.start_from(gradients)

    def losses(self) -> int:
        """The number of loss terms of a backward pass that has started."""
        return self.gradients.losses

    def retreat(self, index: int, projections: Sequence[Projection]) -> Iterator[int | GradientSums]:
        """As `GradientPass.retreat`."""
        yield from self.gradients.retreat(index, projections)
