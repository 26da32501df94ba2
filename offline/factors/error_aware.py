"""The error-aware fit: layers are factored in order, each fitted to activations from the already factored layers.

The factors of a projection W are fitted to the inputs x' that the factored model gives it, and to a target M that
corrects part of the error of these inputs:

    min ||M X' - ((1 - f) W X' + f W X)||^2 + lam ||M - W||^2
    M = W ((1 - f) C' + f D + lam I) (C' + lam I)^-1,   C' = sum x' x'^T,  D = sum x x'^T,

with x the dense model's inputs for the same tokens. MPIFA (arXiv 2501.19090) mixes its targets in the same way.

Some projections add their output to the residual stream (o_proj, down_proj). Their target also corrects part of the
error e = h - h' of the stream, as far as it is a linear function of their inputs: M gains g R (C' + lam I)^-1 with
R = sum e x'^T. These projections are found by the data, not by name: the layer's output must equal its input plus
their outputs on the calibration tokens.

Such targets overfit the tokens of this pass. M is therefore truncated to its rank in another norm: that of the Gram
matrix of all calibration tokens plus the shift C' - C, with C = sum x x^T over the pass's tokens (docs/dev/log.md).

A layer runs once with its factors: the forward pass of every batch pauses before each projection until that projection
is factored. Memory holds one layer, the hidden states of both models, the dense inputs of the layer's projections, and
the paused forward passes. Where these do not fit, the passes of some batches are repeated for each projection instead,
which gives the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.executor.executor import Executor, combined
from pgsvd_vllm.offline.factors.shard import FitShard, TargetSums, factored_overflow
from pgsvd_vllm.offline.linalg import cholesky, naming
from pgsvd_vllm.offline.model.batch import Batch
from pgsvd_vllm.offline.model.projection import Projection

# Calibration tokens of the pass; twice as many gain as much as half as many lose (docs/dev/log.md).
SEQUENTIAL_TOKENS = 131072
# f and g: the corrected shares of the inputs' error and of the residual stream's error.
CORRECTED = 0.5
STREAM_CORRECTED = 0.5
# lam, as a share of the mean of the diagonal of C'; it grows where rounding makes C' indefinite.
RIDGE = 1e-3
# Largest energy of the stream's correction, relative to that of the projection's own output. A projection of almost no
# output must not become a corrector whose weights are as large as its inputs are small. Others are far smaller.
LARGEST_SHIFT = 100.0


@dataclass(frozen=True)
class Target:
    """The target M = W change + shift of a projection, for inputs with Gram matrix C'.

    Attributes:
        change: float64 [in, in].
        shift: float64 [out, in]; None for a projection that does not add to the residual stream, or almost nothing.
        gram: C' = sum x' x'^T, float64 [in, in].
        dense: C = sum x x^T of the same tokens, float64 [in, in]; None if the pass takes all calibration tokens.
    """

    change: torch.Tensor
    shift: torch.Tensor | None
    gram: torch.Tensor
    dense: torch.Tensor | None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """M, float64 [out, in], for the dense weight W, float64 [out, in]."""
        matrix = weight @ self.change.to(weight.device)
        return matrix if self.shift is None else matrix + self.shift.to(weight.device)


Fit = Callable[[Sequence[Projection], Target | None], Iterable[torch.Tensor]]


class ErrorAwarePass:
    """Factors a model's layers in order, while they run with dense and factored weights side by side.

    Args:
        executor: that runs the samples.
        batches: of the pass.
        device: that computes.
        dtype: of activations.
        all_tokens: whether these are all calibration tokens, whose C is known from calibration.
        kept_tokens: as of `FitShard`.

    Raises:
        InputError: as of `LayerStream`.
    """

    def __init__(
        self,
        executor: Executor,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
        all_tokens: bool = False,
        kept_tokens: int | None = None,
    ) -> None:
        self.executor, self.device, self.dtype, self.all_tokens = executor, device, dtype, all_tokens
        executor.begin(FitShard, batches, all_tokens, kept_tokens)

    def advance(
        self,
        index: int,
        groups: Sequence[Sequence[Projection]],
        ranked: set[str],
        fit: Fit,
        known: Mapping[str, torch.Tensor],
    ) -> Iterator[Projection]:
        """Factor layer `index` and run its dense and its factored version.

        Args:
            index: of the layer.
            groups: its projections grouped by input, in the order in which the layer calls them.
            ranked: names of the projections to factor.
            fit: factors projections for a target and yields the reconstructed weights [out, in]; the target is None for
                a fit of the dense weights to the dense model's inputs.
            known: projection -> reconstructed weight [out, in] of a layer that was factored before; nothing is fitted
                then. Empty otherwise.

        Yields:
            Every projection once it is factored.

        Raises:
            InputError: an output of the factored layer is not finite, or a projection gets other tokens than in the
                dense layer.
        """
        call = self.executor.call
        paths = {p.name: p.path for group in groups for p in group}
        routed = [p for group in groups for p in group if p.reach < 1 and p.name in ranked and not known]
        groups = [group for group in groups if group[0].reach == 1]
        width = max(call("width", index))
        single = [group[0] for group in groups if len(group) == 1 and group[0].out_features == width]
        candidates = [] if known else [p.name for p in single]
        leaders = [] if known else [g[0].name for g in groups if any(p.name in ranked for p in g)]
        opened = [one for one in call("open", index, paths, leaders, candidates) if one is not None]
        writers: list[str] = min(opened)[1] if opened else []  # the first batch decides
        for name, weight in known.items():
            self.executor.tell("set_weight", name, weight)
        # The router sends different tokens to an MoE expert in the factored layer: its inputs have no dense pairs.
        yield from self._fit(routed, None, fit)
        call("start", writers)
        for group in groups:
            leader = group[0]
            if leader.name not in leaders:
                continue
            target = self._target(leader, writers)
            yield from self._fit([p for p in group if p.name in ranked], target, fit)
        call("finish")

    def _fit(self, projections: Sequence[Projection], target: Target | None, fit: Fit) -> Iterator[Projection]:
        """Factor projections and give their reconstructed weights to the factored layer; yields each."""
        for p, weight in zip(projections, fit(projections, target), strict=True):
            self.executor.tell("set_weight", p.name, weight)
            yield p

    def _target(self, p: Projection, writers: Sequence[str]) -> Target | None:
        """The target of a projection; None if it sees zeros alone, or fewer tokens than it has inputs, as it overfits.

        Args:
            p: the projection; the factored layer's forward passes are run until it is called.
            writers: the projections that add to the residual stream, in order.

        Raises:
            InputError: the inputs are not finite, or belong to other tokens than in the dense layer.
        """
        earlier = writers[: writers.index(p.name)] if p.name in writers else None
        total = TargetSums.zero(p.out_features, p.in_features, not self.all_tokens, earlier is not None, self.device)
        *_, found = combined(self.executor.streams("sums", p.name, earlier), total)
        assert isinstance(found, TargetSums)
        gram = found.gram.matrix()
        if not is_finite(gram):
            raise factored_overflow(p.name, self.dtype)
        if found.tokens < p.in_features or not gram.any():
            return None
        with naming(p.name):
            root, ridge = cholesky(gram, RIDGE)
        mixed = found.cross.matrix().mul_(CORRECTED).add_(gram, alpha=1 - CORRECTED)  # in place: they may be GBs
        mixed.diagonal().add_(ridge)
        change = torch.cholesky_solve(mixed.T, root).T
        shift = None
        if found.stream is not None:
            stream = found.stream.matrix()
            shift = STREAM_CORRECTED * torch.cholesky_solve(stream.T, root).T
            if float((shift * stream).sum()) * STREAM_CORRECTED > LARGEST_SHIFT * found.own:
                shift = None
        return Target(change, shift, gram, None if found.dense is None else found.dense.matrix())
