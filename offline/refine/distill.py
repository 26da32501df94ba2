"""Healing: all factors are trained together until the compressed model predicts what the dense one does.

The loss is KL(dense || compressed), the mean over the tokens of calibration text; no other text and
no labels are used. Held-out windows of the same text say when the result is best, and whether it is
better than what it started from: if not, that is what is returned.

Unlike the rest of the pipeline this keeps the whole model in memory, twice: dense and factored.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.format.lowrank import other_rows
from pgsvd_vllm.format.schema import FORMS
from pgsvd_vllm.offline.model.layerwise import hidden_after, logits_after

# Of Adam, a step a window, times the root of the divergence at the start, in nats and at most 1: what the noise of the
# steps costs grows with the rate, and must stay small against what there is to gain. 4e-5 is good at 0.40 nats and 2e-5
# at 0.10; 1e-4 does harm at 0.40 (docs/dev/log.md).
LEARNING_RATE = 6e-5
# Of Adam; short memories, since a run takes a hundred steps, not a million.
BETAS = (0.9, 0.95)
# Share of the time in which the learning rate rises; then it falls linearly to 0.
WARM_UP = 0.05
# Shares of the time after which the result is judged: the falling learning rate makes the last ones the best.
JUDGED = (0.5, 0.75, 1.0)
# Tokens whose logits are in memory at a time; small buffers are also faster.
TOKENS_PER_CHUNK = 128
Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Refined:
    """What healing gave.

    Attributes:
        tensors: projection -> suffix -> tensor, in the dtypes they came in.
        before, after: KL to the dense model on the held-out windows, nats a token; `after` is never larger.
        steps: optimiser steps taken.
    """

    tensors: Tensors
    before: float
    after: float
    steps: int


class TrainedProjection(nn.Module):
    """A factored projection with float32 numbers to train, computed in the dtype of its input."""

    def __init__(self, tensors: dict[str, torch.Tensor], bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__()
        pivots = tensors.get("pivots")
        self.tensors = tensors
        self.names = FORMS["factors" if pivots is None else "pivot"][:2]
        self.down, self.up = (nn.Parameter(tensors[n].to(device, torch.float32, copy=True)) for n in self.names)
        self.bias = bias
        self.others: torch.Tensor | None = None
        self.unit = torch.empty(0)
        if pivots is not None:
            pivots = pivots.long().to(device)
            out = len(pivots) + len(self.up)
            self.others = other_rows(pivots, out)
            # The pivot rows of a product are its inner values themselves.
            self.unit = torch.zeros(out, len(pivots), device=device)
            self.unit[pivots, torch.arange(len(pivots), device=device)] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        up = self.up.to(x.dtype)
        if self.others is not None:
            # Whole rows of the small matrix are put in place: three times faster than columns of the outputs.
            self.unit = self.unit.to(x.dtype)
            up = self.unit.index_copy(0, self.others, up)
        return F.linear(F.linear(x, self.down.to(x.dtype)), up, self.bias)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors as they are now, in the dtypes they came in, on the CPU."""
        trained = zip(self.names, (self.down, self.up), strict=True)
        return self.tensors | {n: t.detach().to("cpu", self.tensors[n].dtype, copy=True) for n, t in trained}


class Distiller:
    """Trains the factors of one model.

    Args:
        dense: the dense model on its device; it is left as it is.
        student: another copy of it, whose projections are replaced.
        layers_name: module path of the list of decoder layers.
        tensors: projection -> suffix -> tensor, the factors to start from.
    """

    def __init__(self, dense: PreTrainedModel, student: PreTrainedModel, layers_name: str, tensors: Tensors) -> None:
        self.dense, self.student = dense.eval(), student.eval()
        layers: list[Any] = [model.get_submodule(layers_name) for model in (dense, student)]
        self.dense_layers: list[nn.Module] = list(layers[0])
        self.tensors = tensors
        student.requires_grad_(False)
        self.trained: dict[str, TrainedProjection] = {}
        for name, row in tensors.items():
            linear: Any = student.get_submodule(name)
            self.trained[name] = TrainedProjection(row, linear.bias, linear.weight.device)
            student.set_submodule(name, self.trained[name])
        self.layers: list[nn.Module] = list(layers[1])
        self._hidden: dict[int, torch.Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for module in self.trained.values() for parameter in (module.down, module.up)]

    @torch.no_grad()
    def _wanted(self, key: int, ids: torch.Tensor) -> torch.Tensor:
        """The dense model's last hidden states, which are kept: logits would be too large."""
        if key not in self._hidden:
            self._hidden[key] = hidden_after(self.dense, self.dense_layers, ids)
        return self._hidden[key]

    def _losses(self, ids: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> Iterator[torch.Tensor]:
        """KL(dense || student) in parts that add up to the mean over a window's tokens, in nats.

        Args:
            ids: int64 [1, length].
            wanted, found: [1, length, hidden], the hidden states after the last layer.
        """
        length = ids.shape[1]
        for start in range(0, length, TOKENS_PER_CHUNK):
            part = slice(start, start + TOKENS_PER_CHUNK)
            with torch.no_grad():
                target = logits_after(self.dense, self.dense_layers, ids[:, part], wanted[:, part])
                target = target.float().log_softmax(-1)
            logits = logits_after(self.student, self.layers, ids[:, part], found[:, part])
            yield F.kl_div(logits.float().log_softmax(-1), target, reduction="sum", log_target=True) / length

    def learn(self, key: int, row: torch.Tensor) -> None:
        """Add the gradients of one window's divergence; row: int64 [length]."""
        ids = row.unsqueeze(0).to(self.student.device)
        wanted = self._wanted(key, ids)
        found = hidden_after(self.student, self.layers, ids)
        leaf = found.detach().requires_grad_()
        for loss in self._losses(ids, wanted, leaf):
            loss.backward()
        found.backward(leaf.grad)

    @torch.no_grad()
    def divergence(self, key: int, row: torch.Tensor) -> float:
        """KL(dense || student) of one window [length], the mean over its tokens, in nats."""
        ids = row.unsqueeze(0).to(self.student.device)
        found = hidden_after(self.student, self.layers, ids)
        return sum(loss.item() for loss in self._losses(ids, self._wanted(key, ids), found))

    def judge(self, held_out: torch.Tensor) -> float:
        """Mean divergence on the held-out windows; NaN counts as the worst."""
        mean = sum(self.divergence(-1 - i, row) for i, row in enumerate(held_out)) / len(held_out)
        return mean if math.isfinite(mean) else math.inf

    def run(
        self,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        minutes: float,
        seed: int = 0,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Refined:
        """Train for some minutes.

        Args:
            windows: int64 [count, length], to train on: in this order, then in others as long as time is left.
            held_out: int64 [any, length], never trained on.
            minutes: of training, the evaluations included; the learning rate follows the clock.
            seed: of the later orders.
            say: called with a line when it ends.
        """
        start, budget = time.monotonic(), minutes * 60
        generator = torch.Generator().manual_seed(seed)
        before = best = self.judge(held_out)
        rate = LEARNING_RATE * min(before, 1.0) ** 0.5
        optimiser = torch.optim.Adam(self.parameters, lr=rate, betas=BETAS)
        kept, steps, judged = self.tensors, 0, 0
        order = list(reversed(range(len(windows))))
        with tqdm(total=round(budget), unit="s", desc="refine", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
            while (share := (time.monotonic() - start) / budget) < 1:
                optimiser.param_groups[0]["lr"] = rate * min(1.0, (share + 0.01) / WARM_UP, 1 - share)
                order = order or torch.randperm(len(windows), generator=generator).tolist()
                key = order.pop()
                self.learn(key, windows[key])
                optimiser.step()
                optimiser.zero_grad()
                steps += 1
                bar.update(min(round(budget), round(time.monotonic() - start)) - bar.n)
                if share >= JUDGED[judged]:
                    judged += 1
                    best, kept = self._better(held_out, best, kept)
                    bar.set_postfix_str(f"KL {before:.4f} -> {best:.4f}")
        best, kept = self._better(held_out, best, kept)
        say(f"refined: {steps} steps, KL to the dense model on held-out text {before:.4f} -> {best:.4f} nats a token")
        return Refined(kept, before, best, steps)

    def _better(self, held_out: torch.Tensor, best: float, kept: Tensors) -> tuple[float, Tensors]:
        """The current factors as they would be stored, if they are better."""
        found = self.judge(held_out)
        if found >= best:
            return best, kept
        return found, {name: module.stored() for name, module in self.trained.items()}
