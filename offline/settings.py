"""The resolved settings of one run: every default that the options leave open is decided here, once."""

from dataclasses import dataclass

import torch

from pgsvd_vllm.format.quantization import Scheme
from pgsvd_vllm.offline.options import BITS, DTYPES, CompressOptions, Dose

MEASURED, FORWARD, UNIFORM = "measured", "forward", "uniform"


@dataclass(frozen=True)
class Storage:
    """One way to store projections.

    Attributes:
        form: of low-rank weights, `pivot` or `factors`.
        scheme: of the matrices, dense weights included; None keeps their dtype.
    """

    form: str
    scheme: Scheme | None = None


@dataclass(frozen=True)
class RunSettings:
    """How a run measures, factors and stores.

    Attributes:
        sensitivity: `measured` by loss gradients, `forward` by forward passes alone, or `uniform`.
        storages: the ways to store a projection, among which the front chooses.
        sequential: whether each layer is fitted to activations from the already factored layers.
        baseline: another method's name, or None.
        head_tolerance: relative error allowed in the LM head's weighted logits, between 0 and 1.
        dose: of knowledge distillation, or None.
        seed: of the draws of windows, pairs and labels.
        device: that computes.
        compute_dtype: of the calibration forward pass.
        store_dtype: of the written tensors; None keeps each tensor's own.
        kept_tokens: whose activations the layer-by-layer fit keeps; None for all. Fewer take longer; results are equal.
    """

    sensitivity: str
    storages: tuple[Storage, ...]
    sequential: bool
    baseline: str | None
    head_tolerance: float
    dose: Dose | None
    seed: int
    device: torch.device
    compute_dtype: torch.dtype
    store_dtype: torch.dtype | None
    kept_tokens: int | None = None

    @property
    def measured(self) -> bool:
        """Whether sensitivities are measured, by gradients or by forward passes, rather than assumed equal."""
        return self.sensitivity != UNIFORM

    @property
    def quantizes(self) -> bool:
        """Whether projections may be quantized."""
        return any(storage.scheme is not None for storage in self.storages)

    @property
    def chooses_bits(self) -> bool:
        """Whether the front chooses how each projection is stored."""
        return len(self.storages) > 1


def store_dtype(options: CompressOptions) -> torch.dtype | None:
    """The dtype that the options ask for; None keeps each tensor's own."""
    return None if options.dtype == "auto" else DTYPES[options.dtype]


def resolve_settings(
    options: CompressOptions, device: torch.device, compute_dtype: torch.dtype, dose: Dose | None
) -> RunSettings:
    """The settings that follow from the options.

    Args:
        options: checked by `check_options`, with `serve_on` set.
        device: that computes.
        compute_dtype: of the calibration forward pass.
        dose: of knowledge distillation.
    """
    default = MEASURED if options.tolerance is None and options.baseline is None else UNIFORM
    sensitivity = options.sensitivity or default
    informed = sensitivity != UNIFORM or options.baseline == "pifa"

    def storage(scheme: Scheme | None) -> Storage:
        # With 4 bits the pivot form loses more by rounding than its higher ranks gain (docs/dev/log.md), and GPUs are
        # slower with it at the same size (docs/kernels.md).
        pivot = informed and (scheme is None or scheme.num_bits == 8) and options.serve_on != "gpu"
        pivot = pivot or options.baseline == "pifa"
        return Storage(options.form or ("pivot" if pivot else "factors"), scheme)

    return RunSettings(
        sensitivity=sensitivity,
        storages=tuple(storage(scheme) for scheme in BITS[options.bits]),
        sequential=informed if options.sequential is None else options.sequential,
        baseline=options.baseline,
        head_tolerance=options.head_tolerance,
        dose=dose,
        seed=options.seed,
        device=device,
        compute_dtype=compute_dtype,
        store_dtype=store_dtype(options),
    )
