"""Healing: all factors are trained together until the compressed model predicts what the dense one does.

The loss is KL(dense || compressed), the mean over the tokens of calibration text; no other text and
no labels are used. Held-out windows of the same text say when the result is best, and whether it is
better than what it started from: if not, that is what is returned.

Unlike the rest of the pipeline this keeps the whole model in memory, twice: dense and factored.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.checkpoint import FORMS
from pgsvd_vllm.kernels.reference import other_rows
from pgsvd_vllm.offline.calibrate import logits_after

WINDOWS_PER_STEP = 2
LEARNING_RATE = 1e-4
# Of Adam; short memories, since a run takes a hundred steps, not a million.
BETAS = (0.9, 0.95)
# Share of the time in which the learning rate rises; then it falls linearly to 0.
WARM_UP = 0.05
EVALUATIONS = 5

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
        self.order: tuple[torch.Tensor, torch.Tensor] | None = None
        if pivots is not None:
            pivots = pivots.long().to(device)
            rows = torch.cat([pivots, other_rows(pivots, len(pivots) + len(self.up))])
            self.order = rows.argsort(), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        z = F.linear(x, self.down.to(x.dtype))
        y = F.linear(z, self.up.to(x.dtype))
        if self.order is not None:
            y = _Permute.apply(torch.cat([z, y], -1), *self.order)
        return y if self.bias is None else y + self.bias

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors as they are now, in the dtypes they came in, on the CPU."""
        trained = zip(self.names, (self.down, self.up), strict=True)
        return self.tensors | {n: t.detach().to("cpu", self.tensors[n].dtype, copy=True) for n, t in trained}


class _Permute(torch.autograd.Function):
    """x[..., order], with the inverse permutation as its backward: much faster than scattering gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(-1, ctx.inverse), None, None


class Healer:
    """Trains the factors of one model.

    Args:
        dense: the dense model on its device; it is left as it is.
        student: another copy of it, whose projections are replaced.
        layers_name: module path of the list of decoder layers.
        tensors: projection -> suffix -> tensor, the factors to start from.
    """

    def __init__(self, dense: PreTrainedModel, student: PreTrainedModel, layers_name: str, tensors: Tensors) -> None:
        self.dense, self.student = dense.eval(), student.eval()
        layers: Any = dense.get_submodule(layers_name)
        self.dense_layers: list[nn.Module] = list(layers)
        self.tensors = tensors
        student.requires_grad_(False)
        self.trained: dict[str, TrainedProjection] = {}
        for name, row in tensors.items():
            linear: Any = student.get_submodule(name)
            self.trained[name] = TrainedProjection(row, linear.bias, linear.weight.device)
            student.set_submodule(name, self.trained[name])
        self._hidden: dict[int, torch.Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for module in self.trained.values() for parameter in (module.down, module.up)]

    def _dense_logits(self, key: int, ids: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the dense model; its last hidden states are kept, logits are too large."""
        if key not in self._hidden:
            kept: list[torch.Tensor] = []
            handle = self.dense_layers[-1].register_forward_hook(
                lambda _module, _args, output: kept.append(output[0] if isinstance(output, tuple) else output)
            )
            logits = self.dense(input_ids=ids, use_cache=False).logits
            handle.remove()
            self._hidden[key] = kept[0]
            return logits[0]
        return logits_after(self.dense, self.dense_layers, ids, self._hidden[key])[0]

    def divergence(self, key: int, row: torch.Tensor) -> torch.Tensor:
        """KL(dense || student) of one window [length], the mean over its tokens, in nats."""
        ids = row.unsqueeze(0).to(self.student.device)
        with torch.no_grad():
            target = self._dense_logits(key, ids).float().log_softmax(-1)
        found = self.student(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        return F.kl_div(found, target, reduction="sum", log_target=True) / len(row)

    @torch.no_grad()
    def judge(self, held_out: torch.Tensor) -> float:
        """Mean divergence on the held-out windows; NaN counts as the worst."""
        mean = sum(self.divergence(-1 - i, row).item() for i, row in enumerate(held_out)) / len(held_out)
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
            windows: int64 [count, length], to train on, again and again if time is left.
            held_out: int64 [any, length], never trained on.
            minutes: of training, the evaluations included; the learning rate follows the clock.
            seed: of the order of the windows.
            say: called with a line when it ends.
        """
        start, budget = time.monotonic(), minutes * 60
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, betas=BETAS)
        before = best = self.judge(held_out)
        kept, steps, evaluations = self.tensors, 0, 0
        order: list[int] = []
        with tqdm(total=round(budget), unit="s", desc="refine", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
            while (share := (time.monotonic() - start) / budget) < 1:
                optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (share + 0.01) / WARM_UP, 1 - share)
                for _ in range(WINDOWS_PER_STEP):
                    order = order or torch.randperm(len(windows), generator=generator).tolist()
                    key = order.pop()
                    (self.divergence(key, windows[key]) / WINDOWS_PER_STEP).backward()
                optimiser.step()
                optimiser.zero_grad()
                steps += 1
                bar.update(min(round(budget), round(time.monotonic() - start)) - bar.n)
                if share * EVALUATIONS >= evaluations + 1:
                    evaluations += 1
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
