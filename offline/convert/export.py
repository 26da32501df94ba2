"""Makes a dense checkpoint of a factored one, which any engine loads: each weight is the product of its factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.reader import Checkpoint, open_checkpoint
from pgsvd_vllm.format.writer import TensorWriter, save_config
from pgsvd_vllm.hf.transformers_compat import Conv1D
from pgsvd_vllm.offline.convert.new_folder import NEW, new_folder, refuse_existing
from pgsvd_vllm.offline.convert.skeleton import dense_skeleton
from pgsvd_vllm.offline.model.companions import without_local_code
from pgsvd_vllm.offline.model.source import ModelSource, needs_code, weight_dtype
from pgsvd_vllm.offline.model.weights import fits, read_tensors
from pgsvd_vllm.offline.output.checkpoint import copy_companions

# The begin of the names of a dense model's weight files.
DENSE_STEM = "model"


@dataclass(frozen=True)
class Exported:
    """A dense checkpoint that was made of a factored one.

    Attributes:
        projections: number of projections whose weight was stored in another way.
        nbytes: of all weights.
        nbytes_before: of all weights of the factored checkpoint.
    """

    projections: int
    nbytes: int
    nbytes_before: int


def export(folder: Path, output: Path, trust_remote_code: bool = False) -> Exported:
    """Write the dense version of a checkpoint.

    A weight is computed in float32 (float64 from factors in float32) and rounded once to the dtype of its factors, or
    to the dtype of config.json where they are quantized. All other tensors stay as they are.

    Args:
        folder: of the checkpoint.
        output: folder to write, complete or not at all; must not exist.
        trust_remote_code: copy modelling code, and run it to find the layers that store their weights transposed.

    Raises:
        InputError: the output exists or cannot be written, or the architecture is not supported.
        CheckpointError: the checkpoint is damaged, or a weight is too large for its dtype.
    """
    refuse_existing(output)
    checkpoint = open_checkpoint(folder)
    config = _dense_config(checkpoint.config, trust_remote_code)
    if "auto_map" in checkpoint.config and "auto_map" not in config:
        raise needs_code(folder)
    served = weight_dtype(config, folder)
    with new_folder(output) as scratch:
        dense = scratch / NEW
        save_config(dense, config)
        copy_companions(folder, dense, trust_remote_code)
        transposed = _transposed(dense_skeleton(dense, config, folder, trust_remote_code))
        writer = TensorWriter(dense, stem=DENSE_STEM)
        done = set()
        for name in tqdm(checkpoint.tensors, desc="export", unit="tensor"):
            module = name.rpartition(".")[0]
            if module not in checkpoint.modules or name.rpartition(".")[2] not in checkpoint.modules[module].suffixes:
                writer.add(name, _read(checkpoint, name))
            elif module not in done:
                done.add(module)
                weight = _weight(checkpoint, module, served)
                writer.add(f"{module}.weight", weight.T if module in transposed else weight)
        nbytes = writer.close()
        ModelSource(dense, trust_remote_code)  # checks names and shapes against the architecture
    return Exported(len(done), nbytes, sum(info.nbytes for info in checkpoint.tensors.values()))


def _dense_config(config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """config.json of the dense model."""
    dense = {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}
    return dense if trust_remote_code else without_local_code(dense)


def _transposed(model: PreTrainedModel) -> set[str]:
    """The modules that store their weights transposed, as GPT-2's do, under their names in the checkpoint."""
    found = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return {*found, *(name.removeprefix(f"{model.base_model_prefix}.") for name in found)}


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A stored tensor; raises CheckpointError if it is not finite."""
    ((_, tensor),) = read_tensors(checkpoint.tensors[name].file, [name])
    if not is_finite(tensor):
        raise CheckpointError(f"{checkpoint.tensors[name].file}: tensor {name} holds NaN or infinity")
    return tensor


def _weight(checkpoint: Checkpoint, name: str, served: torch.dtype) -> torch.Tensor:
    """The dense weight [out, in] of a module.

    Args:
        checkpoint: that holds it.
        name: of the module.
        served: dtype of the weight where all its matrices are quantized.
    """
    module = checkpoint.modules[name]
    stored = {suffix: _read(checkpoint, f"{name}.{suffix}") for suffix in module.suffixes}
    kept = {tensor.dtype for suffix, tensor in stored.items() if suffix in module.matrices}
    target = kept.pop() if kept else served
    exact = torch.float64 if target == torch.float32 else torch.float32
    weight = reconstruct(dequantized(stored, module.schemes, exact), exact, name)
    if not fits(weight, target):
        raise CheckpointError(f"{checkpoint.folder}: the weight of {name} is too large for {target}")
    return weight.to(target)
