"""The projections of the model that knowledge distillation trains: factors, or the scales of quantized matrices."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pgsvd_vllm.format.lowrank import factored_linear, other_rows, pivot_linear
from pgsvd_vllm.format.quantization import PACKED, SCALE, Scheme, dequantize, unpack
from pgsvd_vllm.format.schema import FORMS


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 parameter as it will be stored, float32; its gradient is that before the rounding."""
    return exact + (exact.to(dtype).float() - exact).detach()


class _RoundedLinear(torch.autograd.Function):
    """y = x W^T + b with W as it will be stored, made of a float32 parameter; the gradient is that before the rounding.

    W is made again in the backward pass: kept for all layers it would take as much memory as the model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        exact: torch.Tensor,
        made: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
        rows: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """y [..., out] for x [..., in].

        Args:
            ctx: of autograd.
            x: inputs.
            exact: the float32 parameter.
            made: W [out, in] in a dtype of the parameter.
            rows: rows of W that are trained; None for all.
            bias: [out] or None; it is not trained.
        """
        ctx.save_for_backward(x, exact)
        ctx.made, ctx.rows = made, rows
        return F.linear(x, made(exact, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """The gradients of x and of the parameter."""
        x, exact = ctx.saved_tensors
        (gradient,) = gradients
        outer = gradient.flatten(0, -2)
        trained = outer if ctx.rows is None else outer[:, ctx.rows]
        return gradient @ ctx.made(exact, x.dtype), (trained.T @ x.flatten(0, -2)).float(), None, None, None


class TrainedProjection(nn.Module):
    """A factored projection whose float32 parameters are trained; it computes in the dtype of its input.

    It computes with the parameters as they will be stored, also where that dtype is narrower than the input's: a pivot
    form that is trained in float32 and rounded in the end loses part of the gain (docs/dev/log.md).

    Attributes:
        rate: Adam's learning rate for one step per window is this times the root mean square of the initial parameter,
            times the root of the initial divergence (in nats, at most 1). Adam's steps do not depend on the size of
            gradients, and models differ twentyfold in the size of their weights. The loss from gradient noise grows
            with the rate and must stay small against the possible gain (docs/dev/log.md).

    Args:
        tensors: suffix -> tensor of either form (see `format.schema.form_shapes`).
        bias: [out] or None; it is not trained.
        device: of the parameters.
    """

    rate = 3e-4

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
            # The pivot rows of the up factor are unit vectors: their outputs equal z = P x.
            self.unit = torch.zeros(out, len(pivots), device=device)
            self.unit[pivots, torch.arange(len(pivots), device=device)] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        z = _RoundedLinear.apply(x, self.down, self._stored_down, None, None)
        y: torch.Tensor = _RoundedLinear.apply(z, self.up, self._stored_up, self.others, self.bias)
        return y

    def _stored_down(self, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The down factor as it will be stored, in the dtype of the inputs."""
        return exact.to(self.tensors[self.names[0]].dtype).to(dtype)

    def _stored_up(self, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The up factor as it will be stored, its rows of the pivots included, in the dtype of the inputs."""
        up = exact.to(self.tensors[self.names[1]].dtype).to(dtype)
        if self.others is None:
            return up
        # Scattering rows of the up factor is three times faster than scattering columns of the outputs.
        self.unit = self.unit.to(dtype)
        return self.unit.index_copy(0, self.others, up)

    @property
    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """The trained parameters with their learning rates."""
        return [(p, self.rate * float(p.detach().square().mean().sqrt())) for p in (self.down, self.up)]

    def stored(self) -> dict[str, torch.Tensor]:
        """The current tensors by suffix, on the CPU, in the dtypes of the initial factors."""
        trained = zip(self.names, (self.down, self.up), strict=True)
        return self.tensors | {n: t.detach().to("cpu", self.tensors[n].dtype, copy=True) for n, t in trained}


class TrainedScales(nn.Module):
    """A quantized projection, factored or dense, whose scales are trained; its integers stay as they are.

    A scale is its initial value times 1 plus a trained float32 number, so that all scales change in proportion.

    Attributes:
        rate: as of `TrainedProjection`; the trained numbers are in units of the initial scales.

    Args:
        tensors: suffix -> stored tensor.
        schemes: suffix -> scheme of the quantized matrices.
        bias: [out] or None; it is not trained.
        device: of the parameters.
    """

    rate = 2e-3

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        bias: nn.Parameter | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.tensors, self.bias = tensors, bias
        self.fixed = {s: t.to(device) for s, t in tensors.items() if not s.endswith((PACKED, SCALE))}
        self.values = {s: unpack(tensors[f"{s}{PACKED}"], scheme).to(device) for s, scheme in schemes.items()}
        self.initial = {s: tensors[f"{s}{SCALE}"].to(device, torch.float32) for s in schemes}
        self.changes = nn.ParameterDict({s: nn.Parameter(torch.zeros_like(t)) for s, t in self.initial.items()})

    def _scale(self, suffix: str) -> torch.Tensor:
        """The scale as it will be stored, float32; its gradient is that of the scale before the rounding."""
        return rounded(self.initial[suffix] * (1 + self.changes[suffix]), self.tensors[f"{suffix}{SCALE}"].dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        own = {s: t if s == "pivots" else t.to(x.dtype) for s, t in self.fixed.items()}
        own |= {s: dequantize(values, self._scale(s), x.dtype) for s, values in self.values.items()}
        if "weight" in own:
            return F.linear(x, own["weight"], self.bias)
        if "pivots" in own:
            return pivot_linear(x, own["weight_p"], own["weight_c"], own["pivots"], self.bias)
        return factored_linear(x, own["weight_v"], [own["weight_u"]], self.bias)

    @property
    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """The trained parameters with their learning rates."""
        return [(change, self.rate) for change in self.changes.values()]

    def stored(self) -> dict[str, torch.Tensor]:
        """The current tensors by suffix, on the CPU, in the dtypes of the initial ones."""
        names = {s: f"{s}{SCALE}" for s in self.values}
        return self.tensors | {n: self._scale(s).detach().to("cpu", self.tensors[n].dtype) for s, n in names.items()}
