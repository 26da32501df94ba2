"""Linear layers in the stored forms, which stand in a transformers model in place of its dense projections."""

import torch
import torch.nn.functional as F
from torch import nn

from pgsvd_vllm.format.lowrank import factored_linear, other_rows, pivot_linear
from pgsvd_vllm.format.quantization import PACKED, SCALE, dequantize, unpack
from pgsvd_vllm.format.schema import DENSE, FactoredModule

_DTYPES = {
    **{"I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn},
    **{"F32": torch.float32, "BF16": torch.bfloat16},
}


class LowRankLinear(nn.Module):
    """A linear layer in one of the format's forms (see `format.schema`).

    Quantized matrices stay packed and are dequantized in every forward pass.

    Args:
        in_features: inputs.
        out_features: outputs.
        module: the layer's row of the module table.
        bias: whether there is a bias [out].
        device: of the tensors.
        dtype: of the matrices that are not quantized, and of the bias.
    """

    form: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        module: FactoredModule,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, module.rank
        self.schemes = module.schemes

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(*shape, dtype=dtype, device=device))

        for suffix, shape in module.shapes(out_features, in_features).items():
            scheme = self.schemes.get(suffix)
            if suffix == "pivots":
                buffer(suffix, shape, torch.int32)
            elif scheme is None:
                self.register_parameter(suffix, empty(*shape))
            else:
                shapes = scheme.shapes(*shape)
                buffer(f"{suffix}{PACKED}", shapes[PACKED], _DTYPES[scheme.dtype])
                buffer(f"{suffix}{SCALE}", shapes[SCALE], _DTYPES[scheme.scale_dtype])
        self.bias = empty(out_features) if bias else None

    def matrix(self, suffix: str, dtype: torch.dtype) -> torch.Tensor:
        """A matrix; in `dtype` if it is quantized."""
        scheme = self.schemes.get(suffix)
        if scheme is None:
            return getattr(self, suffix)
        values = unpack(getattr(self, f"{suffix}{PACKED}"), scheme)
        return dequantize(values, getattr(self, f"{suffix}{SCALE}"), torch.float32).to(dtype)

    def extra_repr(self) -> str:
        """The sizes that print(model) shows."""
        names = sorted({scheme.name for scheme in self.schemes.values()})
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return ", ".join([sizes, *names])


class FactoredLinear(LowRankLinear):
    """y = U (V x) + b, the form `factors`."""

    form = "factors"
    weight_v: torch.Tensor
    weight_u: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        v, u = (self.matrix(suffix, x.dtype) for suffix in ("weight_v", "weight_u"))
        return factored_linear(x, v, [u], self.bias)


class PivotLinear(LowRankLinear):
    """y[pivots] = z and y[others] = C z with z = P x, plus b: the form `pivot` (PIFA, arXiv 2501.19090)."""

    form = "pivot"
    weight_p: torch.Tensor
    weight_c: torch.Tensor
    pivots: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        p, c = (self.matrix(suffix, x.dtype) for suffix in ("weight_p", "weight_c"))
        return pivot_linear(x, p, c, self.pivots, self.bias)


class QuantizedLinear(LowRankLinear):
    """y = W x + b with a quantized W: the form `dense`."""

    form = DENSE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's dtype."""
        return F.linear(x, self.matrix("weight", x.dtype), self.bias)


MODULES: dict[str, type[LowRankLinear]] = {cls.form: cls for cls in (FactoredLinear, PivotLinear, QuantizedLinear)}


@torch.no_grad()
def with_update(layer: FactoredLinear | PivotLinear, b: torch.Tensor, a: torch.Tensor) -> FactoredLinear:
    """The layer whose weight is W + B A: [U, B] [V; A] for a layer W = U V of rank r.

    The pivot form has no room for an update. U holds the identity at its pivots and C elsewhere.

    Args:
        layer: of rank r, its matrices not quantized.
        b: [out, k].
        a: [k, in].

    Returns:
        A layer of rank r + k with the form `factors`, in the dtype and on the device of `layer`, and with its bias.
    """
    if isinstance(layer, PivotLinear):
        v, pivots = layer.weight_p, layer.pivots.long()
        u = v.new_zeros(layer.out_features, layer.rank)
        u[pivots, torch.arange(layer.rank, device=u.device)] = 1
        u[other_rows(pivots, layer.out_features)] = layer.weight_c
    else:
        v, u = layer.weight_v, layer.weight_u
    row = FactoredModule(layer.rank + len(a))
    updated = FactoredLinear(layer.in_features, layer.out_features, row, bias=False, device="meta")
    updated.weight_v, updated.weight_u = nn.Parameter(torch.cat([v, a.to(v)])), nn.Parameter(torch.cat([u, b.to(u)], 1))
    updated.bias = layer.bias
    return updated
