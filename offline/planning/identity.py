"""What a run's calibration depends on: by content, so that files that were only moved or touched are the same."""

import hashlib
import json
from collections.abc import Sequence

import torch
import transformers

import pgsvd_vllm
from pgsvd_vllm.offline.model.content import content_digest
from pgsvd_vllm.offline.model.projection import LM_HEAD, Projection
from pgsvd_vllm.offline.options import BUILTIN, SELF
from pgsvd_vllm.offline.planning.plan import Plan
from pgsvd_vllm.offline.state.manifest import Manifest

# Version of the stored calibration; a run of another version cannot be resumed. Increment it with every change.
CALIBRATION_VERSION = "8"
# Recorded for a run whose distillation does not fit into memory, so that a resumed one is the same.
DISTILLATION, LEFT_OUT = "distillation", "left out"
# Recorded since their defaults depend on the machine: where the model is served, the text and the number of windows.
SERVE_ON, DATASET, SAMPLES = "serve on", "data set", "samples"


def manifest(plan: Plan) -> Manifest:
    """What identifies the run of a plan.

    Every byte of the weights is read and hashed, which takes a small share of one pass over the calibration set.

    Raises:
        InputError: a file of the model cannot be read.
    """
    source, windows = plan.source, plan.data.windows.ids
    weights = {info.file for info in source.weights.tensors.values()}
    code = source.folder.glob("*.py") if plan.options.trust_remote_code else ()
    identity = {
        "weights": content_digest(weights),
        "config.json": hashlib.sha256(json.dumps(source.config_json, sort_keys=True).encode()).hexdigest(),
        "model code": content_digest(code),
        "calibration text": f"{plan.data.sha256} {plan.data.samples} {tuple(windows.shape)}",
        "seed": str(plan.options.seed),
        "dtype": str(plan.settings.compute_dtype),
        "ignore": " ".join(plan.options.ignore),
        "include": " ".join(kind for kind in plan.options.include if kind != LM_HEAD),
        "set of projections": _projections(plan.projections.layers),
        "program version": CALIBRATION_VERSION,
    }
    kept = {"sensitivity": plan.settings.sensitivity, SERVE_ON: str(plan.options.serve_on)}
    if plan.options.num_calibration_samples is not None:
        kept[SAMPLES] = str(plan.options.num_calibration_samples)
    if plan.options.dataset in ((SELF,), (BUILTIN,)):
        kept[DATASET] = plan.options.dataset[0]
    if plan.short_of_memory:
        kept[DISTILLATION] = LEFT_OUT
    return Manifest(identity, kept, _environment(plan.settings.device))


def _projections(layers: Sequence[Sequence[Projection]]) -> str:
    """SHA-256 of the names and shapes of the projections of every layer."""
    rows = [[(p.name, p.out_features, p.in_features) for p in row] for row in layers]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _environment(device: torch.device) -> dict[str, str]:
    """The versions of this program and of its libraries, and the processor with its threads."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{torch.backends.cpu.get_cpu_capability()} with {torch.get_num_threads()} threads"
    return {
        "pgsvd-vllm": pgsvd_vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor,
    }
