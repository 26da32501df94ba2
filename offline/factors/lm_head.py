"""Factors the LM head, on request, by a tolerance of its own in a norm that weights likely tokens.

A small change dz of a token's logits costs 0.5 dz^T (diag(p) - p p^T) dz nats, p being the model's probabilities. The
diagonal, averaged over the calibration tokens, is the weight of each row of the LM head: rows are multiplied by its
root. No row weighs less than the mean, since a token that is unlikely in the calibration text may be likely in another
text (docs/dev/log.md).

An LM head has many more rows than columns. With S its weighted rows, everything is computed from S^T S [in, in] and
from blocks of rows of S.
"""

import torch

from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.schema import stored_size
from pgsvd_vllm.offline.calibration.lm_head import gram_of_rows, row_scale, weighted_blocks
from pgsvd_vllm.offline.factors.stored_form import not_finite
from pgsvd_vllm.offline.linalg import eigh, gram_root, naming
from pgsvd_vllm.offline.model.projection import Projection
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.ranks.error_profile import error_profile, rank_for
from pgsvd_vllm.offline.ranks.stored import hardware_rank
from pgsvd_vllm.offline.records import LMHeadCalibration, LMHeadFactors, ModuleReport
from pgsvd_vllm.offline.settings import RunSettings, Storage


def factor_lm_head(
    source: ModelSource, settings: RunSettings, head: Projection, found: LMHeadCalibration
) -> LMHeadFactors:
    """Factor the LM head with the smallest rank whose weighted relative error is within the tolerance.

    With C = R R^T and Q D Q^T the leading eigenpairs of R^T S^T S R, U is S R Q D^-1/2 divided by the rows' weights. V
    is the least-squares solution for the rounded U.

    Args:
        source: the model.
        settings: of the run, with `head_tolerance`.
        head: the LM head.
        found: its calibration.

    Returns:
        `weight_u` [vocabulary, rank] and `weight_v` [rank, in] in the stored dtype, on the CPU; no tensors if factors
        would be larger than the dense weight.

    Raises:
        InputError: the factors are not finite in the stored dtype.
    """
    out, width = head.out_features, head.in_features
    profile = error_profile(found.energy)
    rank = min(hardware_rank(head, rank_for(profile, settings.head_tolerance), Storage("factors")), width)
    if stored_size("factors", out, width, rank) >= head.numel:
        return LMHeadFactors(head.name, {}, ModuleReport.dense(head.name, out, width))
    stored = source.weights.tensor(f"{head.path}.weight")
    dtype = settings.store_dtype or stored.dtype
    scale, gram = row_scale(found.weight.to(settings.device)), found.gram.to(settings.device).double()
    with naming(head.name):
        root, square = gram_root(gram), gram_of_rows(stored, scale)
        values, vectors = eigh(root.T @ square @ root)
    # Directions without energy have eigenvalue 0: the clamp avoids a division by 0.
    limits = torch.finfo(torch.float64)
    least = (limits.eps * values[-1]).clamp_min(limits.tiny)
    wide = root @ (vectors[:, -rank:].flip(1) / values[-rank:].flip(0).clamp_min(least).sqrt())
    u = torch.cat([((block @ wide) / scale[rows]).to(dtype) for rows, block in weighted_blocks(stored, scale)])
    mixed = torch.zeros(rank, width, dtype=torch.float64, device=settings.device)
    for rows, block in weighted_blocks(stored, scale):
        mixed += (scale[rows] * u[rows].double()).T @ block
    with naming(head.name):
        v = (torch.linalg.pinv(gram_of_rows(u, scale), hermitian=True) @ mixed).to(dtype)
    if not is_finite(u) or not is_finite(v):
        raise not_finite(head.name, dtype)
    missed = torch.zeros((), dtype=torch.float64, device=settings.device)
    for rows, block in weighted_blocks(stored, scale):
        missed += ((block - scale[rows] * u[rows].double() @ v.double()) @ root).square().sum()
    error = float((missed / found.energy.sum().to(missed.device)).sqrt()) if found.energy.sum() > 0 else 0.0
    report = ModuleReport(head.name, out, width, rank, error, float(profile[rank]), 0)
    return LMHeadFactors(head.name, {"weight_v": v.cpu().contiguous(), "weight_u": u.cpu().contiguous()}, report)
