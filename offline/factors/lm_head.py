"""The output head, on request: factored by a tolerance of its own, where the model's predictions need it exact.

A small change dz of a token's logits costs 0.5 dz^T (diag(p) - p p^T) dz nats, p being the model's predictions. The
diagonal, averaged over the calibration text, says how much each row of the head matters: rows are weighted by its
root. Words that this text makes unlikely may be likely in another, so none weighs less than the mean (docs/dev/log.md).

A head has many more rows than columns: with S its weighted rows, everything is computed from S^T S [in, in] and, in
blocks of rows, from S itself.
"""

import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.schema import stored_size
from pgsvd_vllm.offline.calibration.lm_head import gram_of_rows, row_scale, weighted_blocks
from pgsvd_vllm.offline.linalg import gram_root
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.allocation import hardware_rank
from pgsvd_vllm.offline.ranks.error_profile import error_profile, rank_for
from pgsvd_vllm.offline.records import LMHeadCalibration, LMHeadFactors, ModuleReport
from pgsvd_vllm.offline.settings import RunSettings


def factor_lm_head(
    source: ModelSource, settings: RunSettings, head: Projection, found: LMHeadCalibration
) -> LMHeadFactors:
    """The factors of the smallest rank whose weighted relative error is within the tolerance.

    With C = R R^T and Q D Q^T the leading eigenvectors of R^T S^T S R, U is S R Q D^-1/2 without the rows' weights. V
    is what fits best to U as it is rounded.

    Raises:
        InputError: they are not finite in the stored dtype.
    """
    out, width = head.out_features, head.in_features
    profile = error_profile(found.energy)
    rank = min(hardware_rank(head, rank_for(profile, settings.head_tolerance)), width)
    if stored_size("factors", out, width, rank) >= head.numel:
        return LMHeadFactors(head.name, {}, ModuleReport(head.name, out, width, None, 0.0, 0.0, 0))
    stored = source.weights.tensor(f"{head.path}.weight")
    dtype = settings.store_dtype or stored.dtype
    scale, gram = row_scale(found.weight.to(settings.device)), found.gram.to(settings.device).double()
    root, square = gram_root(gram), gram_of_rows(stored, scale)
    values, vectors = torch.linalg.eigh(root.T @ square @ root)
    # Directions that carry nothing would be divided by nothing.
    least = torch.finfo(torch.float64).eps * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    wide = root @ (vectors[:, -rank:].flip(1) / values[-rank:].flip(0).clamp_min(least).sqrt())
    u = torch.cat([((block @ wide) / scale[rows]).to(dtype) for rows, block in weighted_blocks(stored, scale)])
    mixed = torch.zeros(rank, width, dtype=torch.float64, device=settings.device)
    for rows, block in weighted_blocks(stored, scale):
        mixed += (scale[rows] * u[rows].double()).T @ block
    v = (torch.linalg.pinv(gram_of_rows(u, scale), hermitian=True) @ mixed).to(dtype)
    if not torch.isfinite(u).all() or not torch.isfinite(v).all():
        raise InputError(f"{head.name}: its factors are not finite in {dtype}; use `dtype` float32 or bfloat16")
    missed = torch.zeros((), dtype=torch.float64, device=settings.device)
    for rows, block in weighted_blocks(stored, scale):
        missed += ((block - scale[rows] * u[rows].double() @ v.double()) @ root).square().sum()
    error = float((missed / found.energy.sum().to(missed.device)).sqrt()) if found.energy.sum() > 0 else 0.0
    report = ModuleReport(head.name, out, width, rank, error, float(profile[rank]), 0)
    return LMHeadFactors(head.name, {"weight_v": v.cpu().contiguous(), "weight_u": u.cpu().contiguous()}, report)
