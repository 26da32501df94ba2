"""Decides how much knowledge distillation a run gets."""

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.data.tokens import Windows
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import DISTILLED_TOKENS, GPU_FLOPS, GPU_GROWTH, HELD_OUT, CompressOptions, Dose
from pgsvd_vllm.offline.settings import MEASURED

# FLOPs of training by default on a CPU: a quarter of an hour of two ordinary cores.
CPU_FLOPS = 1.35e14
# FLOPs per parameter and token: a forward pass of the dense model, and three passes of the factored one.
FLOPS_PER_PARAMETER = 8
# Fewer tokens are not worth the memory.
LEAST_TOKENS = 16384


def dose_on(dose: Dose | None, windows: Windows) -> Dose | None:
    """The amount for a text; None without any, or if a default one finds no windows to hold out."""
    if dose is None or (dose.by_default and len(windows.others) < HELD_OUT):
        return None
    return dose.on(windows.trained)


def dose_of(options: CompressOptions, source: ModelSource, device_type: str) -> Dose | None:
    """The requested amount of distillation, or the default one.

    By default a language model whose losses are measured is trained on DISTILLED_TOKENS tokens, a large one on a CPU on
    fewer or none, and on a GPU on up to GPU_GROWTH times as many.

    Args:
        options: checked by `check_options`.
        source: the model.
        device_type: `cpu` or `cuda`.

    Returns:
        None for no distillation.

    Raises:
        InputError: distillation is requested for a model that it cannot train.
    """
    reason = None
    if source.reads_images:
        reason = f"--refine: trains on text only, but {options.model} takes images; omit it"
    elif source.unstacks_experts:
        reason = "--refine: does not train MoE experts; omit it or --include experts"
    if options.refine == 0:
        return None
    if options.refine is not None or options.refine_tokens is not None:
        if reason is not None:
            raise InputError(reason)
        return Dose(options.refine, options.refine_tokens)
    measured = options.sensitivity in (None, MEASURED) and options.tolerance is None and options.baseline is None
    if reason is not None or not measured:
        return None
    flops = FLOPS_PER_PARAMETER * source.weights.numel
    if device_type == "cpu":
        tokens = min(DISTILLED_TOKENS, int(CPU_FLOPS / flops))
    else:
        tokens = max(DISTILLED_TOKENS, min(GPU_GROWTH * DISTILLED_TOKENS, int(GPU_FLOPS / flops)))
    return Dose(tokens=tokens, by_default=True) if tokens >= LEAST_TOKENS else None
