"""The output head, on request: factored by a tolerance of its own, where the model's predictions need it exact.

A small change dz of a token's logits costs 0.5 dz^T (diag(p) - p p^T) dz nats, p being the model's predictions. The
diagonal, averaged over the calibration text, says how much each row of the head matters: rows are weighed by its
root. Words that this text makes unlikely may be likely in another, so none weighs less than the mean (docs/log.md).
"""

from dataclasses import dataclass

import torch
from torch import nn

from pgsvd_vllm.checkpoint import stored_size
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.allocate import hardware_rank
from pgsvd_vllm.offline.calibrate import gram_of
from pgsvd_vllm.offline.factorize import closed_form, relative_error
from pgsvd_vllm.offline.model_source import Projection
from pgsvd_vllm.offline.plan import Plan
from pgsvd_vllm.offline.report import ModuleReport
from pgsvd_vllm.offline.spectrum import error_profile, output_energy, rank_for
from pgsvd_vllm.offline.stream import LayerStream, logits_after

# Logits are wide: no more tokens than this take part.
HEAD_TOKENS = 32768
# The least weight of a row, as a share of the mean.
FLOOR = 1.0


@dataclass(frozen=True)
class HeadCalibration:
    """What calibration finds of the head.

    Attributes:
        gram: float32 [in, in], sum of x x^T.
        weight: float32 [out], mean of p (1 - p) over the tokens.
        energy: float64 [in], descending eigenvalues of the weighed outputs' second moments.
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
            kept = stream.flow.kept[number]
            if len(kept) > 1 or "pixel_values" in batch:
                parts = [stream.output(number, kept).logits]
            else:  # a window at a time
                rows = zip(batch["input_ids"].to(stream.device), kept[last], strict=True)
                parts = [logits_after(source.model, source.layers, ids[None], hidden[None]) for ids, hidden in rows]
            for logits in parts:
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
    weighed = _scale(weight)[:, None] * source.tensor(f"{head.path}.weight").to(stream.device).double()
    return HeadCalibration(gram.float(), weight, output_energy(weighed, gram))


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """What rows are multiplied by, float64 [out]."""
    w = weight.double()
    return w.clamp_min(FLOOR * w.mean()).sqrt()


def factor_head(plan: Plan, head: Projection, found: HeadCalibration) -> HeadFactors:
    """The factors of the smallest rank whose weighed relative error is within the tolerance.

    Raises:
        InputError: they are not finite in the stored dtype.
    """
    tolerance = plan.options.head_tolerance
    profile = error_profile(found.energy)
    rank = min(hardware_rank(head, rank_for(profile, tolerance)), head.in_features)
    if stored_size("factors", head.out_features, head.in_features, rank) >= head.numel:
        return HeadFactors(
            head.name, {}, ModuleReport(head.name, head.out_features, head.in_features, None, 0.0, 0.0, 0)
        )
    stored = plan.source.tensor(f"{head.path}.weight")
    dtype = plan.store_dtype or stored.dtype
    scale = _scale(found.weight.to(plan.device))[:, None]
    target, gram = scale * stored.to(plan.device).double(), found.gram.to(plan.device).double()
    factors = closed_form(target, gram, rank)
    u = (factors.u / scale).to(dtype)
    # Rounding U is repaired by the V that is best for it.
    exact = scale * u.double()
    v = torch.linalg.solve(exact.T @ exact, exact.T @ target).to(dtype)
    error = relative_error(target, gram, exact @ v.double())
    if not torch.isfinite(u).all() or not torch.isfinite(v).all():
        raise InputError(f"{head.name}: its factors are not finite in {dtype}; use --dtype float32 or bfloat16")
    report = ModuleReport(head.name, head.out_features, head.in_features, rank, error, float(profile[rank]), 0)
    return HeadFactors(head.name, {"weight_v": v.cpu().contiguous(), "weight_u": u.cpu().contiguous()}, report)
