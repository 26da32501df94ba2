"""The output head, on request: factored by a tolerance of its own, where the model's predictions need it exact.

A small change dz of a token's logits costs 0.5 dz^T (diag(p) - p p^T) dz nats, p being the model's predictions. The
diagonal, averaged over the calibration text, says how much each row of the head matters: rows are weighed by its
root. Words that this text makes unlikely may be likely in another, so none weighs less than the mean (docs/log.md).

A head has many more rows than columns: with S its weighed rows, everything is computed from S^T S [in, in] and, in
blocks of rows, from S itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pgsvd_vllm.checkpoint import stored_size
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.allocate import hardware_rank
from pgsvd_vllm.offline.calibrate import gram_of
from pgsvd_vllm.offline.model_source import Projection
from pgsvd_vllm.offline.plan import Plan
from pgsvd_vllm.offline.report import ModuleReport
from pgsvd_vllm.offline.spectrum import error_profile, gram_root, rank_for
from pgsvd_vllm.offline.stream import LayerStream, logits_after

# Logits are wide: no more tokens than this take part.
HEAD_TOKENS = 32768
# The least weight of a row, as a share of the mean.
FLOOR = 1.0
# Of a block in float64.
HEAD_ROWS = 8192


@dataclass(frozen=True)
class HeadCalibration:
    """What calibration finds of the head.

    Attributes:
        gram: float32 [in, in], C = sum of x x^T.
        weight: float32 [out], mean of p (1 - p) over the tokens.
        energy: float64 [in], descending eigenvalues of S C S^T.
    """

    gram: torch.Tensor
    weight: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class HeadFactors:
    """The head as it will be stored.

    Attributes:
        name: in the checkpoint.
        tensors: by suffix; none where it stays dense, since factors of that tolerance would be larger.
        report: its row of the report.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    report: ModuleReport


@torch.no_grad()
def measure_head(stream: LayerStream, head: Projection) -> HeadCalibration:
    """Run the head on what the layers have made of the calibration text.

    Args:
        stream: all of whose layers have run.
        head: of its model.

    Raises:
        InputError: fewer tokens than the head has inputs.
    """
    source = stream.source
    source.load_head(stream.device, stream.dtype)
    module: nn.Module = source.model.get_submodule(head.path)
    gram = torch.zeros(head.in_features, head.in_features, dtype=torch.float64, device=stream.device)
    weight = torch.zeros(head.out_features, device=stream.device)
    tokens = 0
    last = len(source.layers) - 1
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        for number, batch in enumerate(stream.batches):
            for logits in _logits(stream, number, batch, last):
                p = logits.flatten(0, -2).float().softmax(-1)
                weight += (p * (1 - p)).sum(0)
                tokens += len(p)
            gram += sum(gram_of(x.flatten(0, -2).float()) for x in inputs)
            inputs.clear()
            if tokens >= HEAD_TOKENS:
                break
    finally:
        handle.remove()
    if tokens < head.in_features:
        raise InputError(
            f"--include lm_head: {tokens} tokens are too little calibration text; {head.name} has {head.in_features} "
            "inputs and needs at least as many"
        )
    weight /= tokens
    root = gram_root(gram)
    square = _square(source.tensor(f"{head.path}.weight"), _scale(weight))
    energy = torch.linalg.eigvalsh(root.T @ square @ root).flip(0).clamp_min(0)
    return HeadCalibration(gram.float(), weight, energy)


def _logits(stream: LayerStream, number: int, batch: dict[str, torch.Tensor], last: int) -> Iterator[torch.Tensor]:
    """Of a batch; of text a window at a time, since they are wide."""
    source, kept = stream.source, stream.flow.kept[number]
    if len(kept) > 1 or "pixel_values" in batch:
        yield stream.output(number, kept).logits
        return
    for ids, hidden in zip(batch["input_ids"].to(stream.device), kept[last], strict=True):
        yield logits_after(source.model, source.layers, ids[None], hidden[None])


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """What rows are multiplied by, float64 [out, 1]."""
    w = weight.double()
    return w.clamp_min(FLOOR * w.mean()).sqrt()[:, None]


def _blocks(matrix: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of a matrix at a time, weighed, float64, where `scale` is."""
    for start in range(0, len(matrix), HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, len(matrix)))
        yield rows, scale[rows] * matrix[rows].to(scale.device).double()


def _square(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """S^T S, float64 [in, in]."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=scale.device)
    for _, block in _blocks(matrix, scale):
        total += block.T @ block
    return total


def factor_head(plan: Plan, head: Projection, found: HeadCalibration) -> HeadFactors:
    """The factors of the smallest rank whose weighed relative error is within the tolerance.

    With C = R R^T and Q D Q^T the leading eigenvectors of R^T S^T S R, U is S R Q D^-1/2 without the rows' weights. V
    is what fits best to U as it is rounded.

    Raises:
        InputError: they are not finite in the stored dtype.
    """
    out, width = head.out_features, head.in_features
    profile = error_profile(found.energy)
    rank = min(hardware_rank(head, rank_for(profile, plan.options.head_tolerance)), width)
    if stored_size("factors", out, width, rank) >= head.numel:
        return HeadFactors(head.name, {}, ModuleReport(head.name, out, width, None, 0.0, 0.0, 0))
    stored = plan.source.tensor(f"{head.path}.weight")
    dtype = plan.store_dtype or stored.dtype
    scale, gram = _scale(found.weight.to(plan.device)), found.gram.to(plan.device).double()
    root, square = gram_root(gram), _square(stored, scale)
    values, vectors = torch.linalg.eigh(root.T @ square @ root)
    # Directions that carry nothing would be divided by nothing.
    least = torch.finfo(torch.float64).eps * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    wide = root @ (vectors[:, -rank:].flip(1) / values[-rank:].flip(0).clamp_min(least).sqrt())
    u = torch.cat([((block @ wide) / scale[rows]).to(dtype) for rows, block in _blocks(stored, scale)])
    mixed = torch.zeros(rank, width, dtype=torch.float64, device=plan.device)
    for rows, block in _blocks(stored, scale):
        mixed += (scale[rows] * u[rows].double()).T @ block
    v = (torch.linalg.pinv(_square(u, scale), hermitian=True) @ mixed).to(dtype)
    if not torch.isfinite(u).all() or not torch.isfinite(v).all():
        raise InputError(f"{head.name}: its factors are not finite in {dtype}; use --dtype float32 or bfloat16")
    missed = torch.zeros((), dtype=torch.float64, device=plan.device)
    for rows, block in _blocks(stored, scale):
        missed += ((block - scale[rows] * u[rows].double() @ v.double()) @ root).square().sum()
    error = float((missed / found.energy.sum().to(missed.device)).sqrt()) if found.energy.sum() > 0 else 0.0
    report = ModuleReport(head.name, out, width, rank, error, float(profile[rank]), 0)
    return HeadFactors(head.name, {"weight_v": v.cpu().contiguous(), "weight_u": u.cpu().contiguous()}, report)
