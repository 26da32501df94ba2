"""Knowledge distillation: all factors, or all scales of quantized matrices, are trained together to match the dense
model's predictions.

The loss is KL(dense || student), the mean over the tokens of the calibration text and of more text of its kind; no
labels are used. The result is the state with the least divergence on held-out windows of the same text, or the factors
from before training if none is better.

Unlike the rest of the pipeline, distillation keeps the whole model in memory, and what it trains in float32 with Adam's
two moments. The gradient of each parameter is applied and freed as soon as the backward pass has computed it.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.offline.model.batch import TOKENS_PER_CHUNK
from pgsvd_vllm.offline.model.layer_calls import hidden_after, logits_after
from pgsvd_vllm.offline.options import STEP_TOKENS, Dose
from pgsvd_vllm.offline.refine.trained import TrainedProjection, TrainedScales

# Adam's betas; short averages, since a run takes about a hundred steps.
BETAS = (0.9, 0.95)
# Share of the amount in which the learning rate rises; then it falls linearly to 0.
WARM_UP = 0.05
# Shares of the amount after which the held-out windows are evaluated; the falling learning rate favours late states.
EVALUATED = (0.5, 0.75, 1.0)
# Windows are trained on in pieces of about as many tokens: attention takes half the time that it takes for 1024 tokens,
# and the divergence on whole windows falls as fast (docs/dev/log.md).
PIECE = 512
# Projection -> suffix -> tensor.
Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Refined:
    """The result of distillation.

    Attributes:
        tensors: projection -> suffix -> tensor, on the CPU, in the dtypes of the initial factors.
        before: KL to the dense model on the held-out windows before training, in nats per token.
        after: the same for `tensors`; never larger than `before`.
        steps: number of optimiser steps.
    """

    tensors: Tensors
    before: float
    after: float
    steps: int


class Distiller:
    """Trains the factors of one model.

    Args:
        dense: the dense model on its device; it is not changed.
        student: another copy of it on the same device, whose projections are replaced by factored ones; both may share
            parameters.
        layers_name: module path of the list of decoder layers, such as `model.layers`.
        tensors: module path of a projection -> suffix -> stored tensor, with initial factors or scales.
        schemes: module path of a quantized projection, whose scales are trained -> suffix -> scheme.
        returned: number of values in the tuple that a layer returns, 0 if it returns a tensor.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        student: PreTrainedModel,
        layers_name: str,
        tensors: Tensors,
        schemes: Mapping[str, Mapping[str, Scheme]],
        returned: int = 0,
    ) -> None:
        self.dense, self.student, self.returned = dense.eval(), student.eval(), returned
        layers: list[Any] = [model.get_submodule(layers_name) for model in (dense, student)]
        self.dense_layers: list[nn.Module] = list(layers[0])
        self.tensors = tensors
        student.requires_grad_(False)
        self.trained: dict[str, TrainedProjection | TrainedScales] = {}
        for name, row in tensors.items():
            linear: Any = student.get_submodule(name)
            bias, device = linear.bias, linear.weight.device
            own = schemes.get(name)
            self.trained[name] = TrainedScales(row, own, bias, device) if own else TrainedProjection(row, bias, device)
            student.set_submodule(name, self.trained[name])
        self.layers: list[nn.Module] = list(layers[1])
        self._hidden: dict[int, torch.Tensor] = {}
        self._comes_again = True
        self._piece = PIECE

    @property
    def parameters(self) -> list[tuple[nn.Parameter, float]]:
        """The trained parameters with their learning rates."""
        return [pair for module in self.trained.values() for pair in module.rates]

    @torch.no_grad()
    def _dense_hidden(self, key: int, ids: torch.Tensor) -> torch.Tensor:
        """The dense model's last hidden states of window `key`; kept if it comes again, since logits are too large."""
        found = self._hidden.get(key)
        if found is None:
            found = hidden_after(self.dense, self.dense_layers, ids)
            if self._comes_again or key < 0:
                self._hidden[key] = found
        return found

    def _losses(self, ids: torch.Tensor, dense: torch.Tensor, student: torch.Tensor) -> Iterator[torch.Tensor]:
        """KL(dense || student) of chunks of tokens, in nats; the sum of all chunks is the mean over the window.

        Args:
            ids: int64 [1, length].
            dense: [1, length, hidden], the dense model's hidden states after the last layer.
            student: [1, length, hidden], the student's.
        """
        for target, logits in self._logits(ids, dense, student):
            found, expected = (x.float().log_softmax(-1) for x in (logits, target))
            yield F.kl_div(found, expected, reduction="sum", log_target=True) / ids.shape[1]

    def _logits(
        self, ids: torch.Tensor, dense: torch.Tensor, student: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The logits [1, tokens, vocabulary] of the dense model and of the student for chunks of a window's tokens."""
        for start in range(0, ids.shape[1], TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            with torch.no_grad():
                target = logits_after(self.dense, self.dense_layers, ids[:, part], dense[:, part], self.returned)
            yield target, logits_after(self.student, self.layers, ids[:, part], student[:, part], self.returned)

    def learn(self, key: int, row: torch.Tensor) -> None:
        """Backward of the divergence of one window or several; nothing if the last layer's gradient is not finite.

        Args:
            key: number of the row, under which the dense hidden states are kept.
            row: int64 [length].
        """
        pieces = max(1, len(row) // self._piece)
        ids = row[: len(row) // pieces * pieces].view(pieces, -1).to(self.student.device)
        dense = self._dense_hidden(key, ids)
        student = hidden_after(self.student, self.layers, ids)
        leaf = student.detach().requires_grad_()
        for i in range(pieces):
            part = slice(i, i + 1)
            for target, logits in self._logits(ids[part], dense[part], leaf[part]):
                # The divergence's gradient in closed form: p of the student minus p of the dense model.
                with torch.no_grad():
                    error = logits.softmax(-1, dtype=torch.float32).sub_(target.softmax(-1, dtype=torch.float32))
                logits.backward(error.div_(ids.numel()).to(logits.dtype))
        assert leaf.grad is not None
        if is_finite(leaf.grad):
            student.backward(leaf.grad)

    @torch.no_grad()
    def divergence(self, key: int, row: torch.Tensor) -> float:
        """KL(dense || student) of one window, the mean over its tokens, in nats.

        Args:
            key: number of the window, under which the dense hidden states are kept.
            row: int64 [length].
        """
        ids = row.unsqueeze(0).to(self.student.device)
        student = hidden_after(self.student, self.layers, ids)
        return sum(loss.item() for loss in self._losses(ids, self._dense_hidden(key, ids), student))

    def evaluate(self, held_out: torch.Tensor) -> float:
        """Mean divergence on the held-out windows, int64 [count, length], in nats per token; infinity for NaN.

        Rounding makes the divergence of equal predictions negative; it counts as 0.
        """
        mean = sum(self.divergence(-1 - i, row) for i, row in enumerate(held_out)) / len(held_out)
        return max(mean, 0.0) if math.isfinite(mean) else math.inf

    def run(
        self,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        dose: Dose,
        seed: int = 0,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Refined:
        """Train on an amount of text.

        Args:
            windows: int64 [count, length], to train on: once in this order, then in random orders. Neighbours of up to
                STEP_TOKENS together are one step.
            held_out: int64 [any, length], never trained on.
            dose: minutes, evaluations included, or tokens; the learning rate falls with what is left.
            seed: of the random orders.
            say: called with one line at the end.

        Raises:
            InputError: the divergence before training is not finite.
        """
        start, trained = time.monotonic(), 0
        self._piece = min(PIECE, windows.shape[1])
        rows = [part.reshape(-1) for part in windows.split(max(1, STEP_TOKENS // windows.shape[1]))]
        self._comes_again = dose.more_than(windows.numel())
        total = 60 * dose.minutes if dose.minutes is not None else dose.tokens or 1

        def done() -> float:
            """Seconds or tokens."""
            return time.monotonic() - start if dose.minutes is not None else trained

        generator = torch.Generator().manual_seed(seed)
        before = best = self.evaluate(held_out)
        if not math.isfinite(before):
            dtype = next(self.student.parameters()).dtype
            raise InputError(
                f"`refine`: the predictions of the dense or the factored model overflow in {dtype}; omit it"
            )
        strength = min(before, 1.0) ** 0.5
        optimisers = self._optimisers()
        kept, steps, evaluations = self.tensors, 0, 0
        order = list(reversed(range(len(rows))))
        # A bar that counts seconds has no rate; the environment's format is for logs.
        layout = os.environ.get("TQDM_BAR_FORMAT", "{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        with tqdm(total=total, initial=min(total, done()), desc="refine", bar_format=layout) as bar:
            while (share := done() / total) < 1:
                for optimiser, rate in optimisers:
                    optimiser.param_groups[0]["lr"] = rate * strength * min(1.0, (share + 0.01) / WARM_UP, 1 - share)
                order = order or torch.randperm(len(rows), generator=generator).tolist()
                key = order.pop()
                self.learn(key, rows[key])
                steps += 1
                trained += len(rows[key])
                bar.update(min(total, done()) - bar.n)
                if share >= EVALUATED[evaluations]:
                    evaluations += 1
                    best, kept = self._select(held_out, best, kept)
                    bar.set_postfix_str(f"KL {before:.4f} -> {best:.4f}", refresh=False)
        best, kept = self._select(held_out, best, kept)
        say(f"distilled: {steps} steps, held-out KL to the dense model {before:.4f} -> {best:.4f} nats per token")
        return Refined(kept, before, best, steps)

    def _optimisers(self) -> list[tuple[torch.optim.Adam, float]]:
        """One optimiser for each parameter, which steps during the backward pass, and its rate."""
        found = []
        for parameter, rate in self.parameters:
            optimiser = torch.optim.Adam([parameter], betas=BETAS, fused=True)  # three times as fast on a CPU
            parameter.register_post_accumulate_grad_hook(partial(_step, optimiser))
            found.append((optimiser, rate))
        return found

    def _select(self, held_out: torch.Tensor, best: float, kept: Tensors) -> tuple[float, Tensors]:
        """The current factors in their stored dtypes with their divergence; `kept` if they are worse or overflow."""
        divergence = self.evaluate(held_out)
        if divergence >= best:
            return best, kept
        return divergence, {name: module.stored() for name, module in self.trained.items()}


def _step(optimiser: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Apply and free a parameter's gradient; one that overflows must not end in the optimiser's averages."""
    assert parameter.grad is not None
    if is_finite(parameter.grad):
        optimiser.step()
    parameter.grad = None
