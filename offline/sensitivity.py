"""Measured sensitivities: second moments of the loss gradient at every projection's output.

For a small change dW of a weight W the loss rises by about 0.5 tr(G dW C dW^T) nats a token, where
C = E[x x^T] are its inputs and G = E[g g^T] the gradients of the loss at its outputs, with labels
drawn from the model itself (the Kronecker-factored Fisher information, Martens and Grosse 2015).
This makes the errors of different projections comparable, which the uniform tolerance assumes and
which is not so.

The gradients come from a layer-wise backward pass: every layer is loaded once more, run forward
again from its stored inputs, and run backward. Memory holds one layer, as in calibration.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibrate import LayerStream, gram_of
from pgsvd_vllm.offline.model_source import Projection

# A backward pass costs twice a forward pass: no more tokens than this take part in it. On other text, factors
# fitted with 16k tokens lost 5 % more than with 32k; 64k should be within 3 % of any number (docs/log.md).
GRADIENT_TOKENS = 65536
# Added to the diagonal of G as a share of its mean, so that directions the few gradients never
# showed still cost something (0.05 to 0.2 measured alike).
DAMPING = 0.1


class GradientPass:
    """Collects G for every projection, from the last layer to the first.

    Args:
        stream: the calibration's stream; `remember` is called before every layer's advance.
        folder: where the layers' inputs are kept meanwhile.
    """

    def __init__(self, stream: LayerStream, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        folder.mkdir(exist_ok=True)
        windows = 0
        self.batches = 0
        for hidden in stream.hidden:
            if windows * hidden.shape[1] >= GRADIENT_TOKENS:
                break
            windows += hidden.shape[0]
            self.batches += 1
        self.tokens = windows * stream.hidden[0].shape[1]
        self._gradients: list[torch.Tensor] = []

    def remember(self, index: int) -> None:
        """Keep the inputs of layer `index`, which the stream is about to replace."""
        inputs = {str(i): hidden.cpu() for i, hidden in enumerate(self.stream.hidden[: self.batches])}
        save_file(inputs, self.folder / f"{index:05d}.safetensors")

    def start(self, seed: int) -> None:
        """Gradients at the last layer's output, of the loss summed over tokens.

        Args:
            seed: of the draw of labels.
        """
        source, device = self.stream.source, self.stream.device
        source.load_head(device, self.stream.dtype)
        generator = torch.Generator(device).manual_seed(seed)
        for batch, hidden in zip(self.stream.ids, self.stream.hidden[: self.batches], strict=False):
            parts = []
            for row, row_ids in zip(hidden, batch, strict=True):  # a window at a time: logits are wide
                leaf = row.unsqueeze(0).detach().requires_grad_()
                logits = self.stream.head(row_ids.unsqueeze(0), leaf).float()[0]
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, labels, reduction="sum").backward()
                if leaf.grad is None or not torch.isfinite(leaf.grad).all():
                    raise InputError(
                        f"{source.folder}: the loss gradient overflows in {self.stream.dtype}; "
                        "calibrate with --dtype float32 or bfloat16"
                    )
                parts.append(leaf.grad)
            self._gradients.append(torch.cat(parts))

    def retreat(self, index: int, projections: Sequence[Projection]) -> Iterator[int | dict[str, torch.Tensor]]:
        """Run layer `index` backward over all batches.

        Yields the tokens done after every batch, and at the end projection -> float64 [out, out],
        the mean over tokens of g g^T.
        """
        moments: dict[str, torch.Tensor] = {}
        path = self.folder / f"{index:05d}.safetensors"
        inputs = load_file(path)
        prefix = f"{self.stream.source.layers_name}.{index}."
        with self.stream.source.layer(index, self.stream.device, self.stream.dtype) as layer:
            handles = [
                layer.get_submodule(p.name.removeprefix(prefix)).register_forward_hook(_gradient_hook(p.name, moments))
                for p in projections
            ]
            try:
                for i in range(self.batches):
                    leaf = inputs[str(i)].to(self.stream.device).requires_grad_()
                    self.stream.run(layer, index, leaf).backward(self._gradients[i])
                    assert leaf.grad is not None
                    self._gradients[i] = leaf.grad
                    yield leaf.shape[0] * leaf.shape[1]
            finally:
                for handle in handles:
                    handle.remove()
        path.unlink()
        yield {name: moment / self.tokens for name, moment in moments.items()}


def _gradient_hook(name: str, moments: dict[str, torch.Tensor]) -> Callable[..., None]:
    def forward_hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            rows = gradient.detach().flatten(0, -2).float()
            product = gram_of(rows)
            moments[name] = moments[name] + product if name in moments else product

        output.register_hook(add)

    return forward_hook


def metric_root(moment: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor L of the damped G, float64: L L^T = G + DAMPING mean(diag G) I.

    Args:
        moment: G [out, out], positive semi-definite.
    """
    g = moment.double()
    mean = g.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.cholesky(g + DAMPING * mean * torch.eye(len(g), dtype=g.dtype, device=g.device))
