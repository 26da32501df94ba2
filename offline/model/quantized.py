"""Refuses models whose weights are quantized already: low-rank factors are fitted to dense floating-point weights."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.schema import FACTOR_SUFFIXES, QUANT_METHOD
from pgsvd_vllm.offline.model.weights import StoredWeights

# Sections of config.json that describe quantized weights: of transformers, of old versions of compressed-tensors and
# of MLX.
SECTIONS = ("quantization_config", "compression_config", "quantization")
# The dtypes of safetensors whose values are the weights themselves.
DENSE_DTYPES = ("F64", "F32", "F16", "BF16")
# Floating-point dtypes that hold weights only together with scales.
_SCALED_DTYPE = re.compile(r"F[468](_|$)")
# Tensors that stand beside quantized weights: GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8, MLX.
_BESIDE_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|zeros"
    r"|weight_packed|weight_shape|weight_g_idx|\w*weight_(scales?|scale_inv|scale_2|zero_point)|input_scale"
    r"|\w+_(blocks|scales)|\w*_qdata|W_q|codebooks|codes|_data|_scale)$|\.quant_state\."
)
# quant_method of config.json -> how to make the model dense, for what `pgsvd-vllm dequantize` does not convert.
_TOOLS = {
    "gptq": "make it dense with gptqmodel.utils.model_dequant.dequantize_model",
    "bitsandbytes": "load it in transformers, dequantize() and save_pretrained it",
    "higgs": "load it in transformers, dequantize() and save_pretrained it",
    "mxfp4": "load it in transformers with Mxfp4Config(dequantize=True) and save_pretrained it",
}
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\.")
# Not to dequantize it in transformers: what that saves keeps the scales of compressed-tensors beside dense weights.
_ADVICE = "start from the dense model that it was made from"


def refuse_quantized_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config.json that describes quantized weights at any depth; raises InputError."""
    for key, section in _sections(config):
        method = section.get("quant_method", key) if isinstance(section, dict) else section
        raise InputError(
            f"{folder}: already compressed or quantized ({method}, by {key} of config.json); "
            + _advice(method, section, folder)
        )


def quantization_of(config: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """The `quant_method` of a quantized model that can be dequantized, and its section of config.json.

    Raises:
        InputError: the model is not quantized, or in another way; names the tool that makes it dense, if there is one.
    """
    key, section = next(_sections(config), ("", None))
    if section is None:
        raise InputError(f"{folder}/config.json: has no quantization_config; the model is not quantized")
    method = section.get("quant_method", key) if isinstance(section, dict) else section
    if not _is_convertible(method, section):
        raise InputError(
            f"{folder}: quantized by {method}, which `pgsvd-vllm dequantize` does not convert; "
            + _advice(method, section, folder)
        )
    return str(method), section


def _is_convertible(method: Any, section: Any) -> bool:
    """Whether the converters of compressed-tensors make it dense: without rotations that run with the model."""
    if not isinstance(section, dict) or section.get("transform_config") or _is_sparse(section):
        return False
    return bool(section.get("weight_block_size")) if method == "fp8" else method in ("compressed-tensors", "awq")


def _is_sparse(section: Mapping[str, Any]) -> bool:
    """Whether weights are stored without their zeros."""
    sparsity = section.get("sparsity_config")
    return isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"


def _advice(method: Any, section: Any, folder: Path) -> str:
    """What to do with a quantized or factored model."""
    if method == QUANT_METHOD:
        return f"start from the dense model, or make it dense: pgsvd-vllm export {shlex.quote(str(folder))} -o DIR"
    if _is_convertible(method, section):
        return f"start from the dense model, or make it dense: pgsvd-vllm dequantize {shlex.quote(str(folder))} -o DIR"
    tool = _TOOLS.get(str(method))
    return "start from the dense model" + (f", or {tool}" if tool else "")


def _sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every section that describes quantized weights."""
    for key, value in config.items():
        if key in SECTIONS and value is not None:
            yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from _sections(value, f"{path}{key}.")


def without_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the sections that describe quantized weights, at any depth."""
    kept = {key: value for key, value in config.items() if key not in SECTIONS}
    return {key: without_sections(value) if isinstance(value, dict) else value for key, value in kept.items()}


def refuse_other_tensors(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Refuse tensors that are not dense floating-point weights, by their headers.

    Args:
        model: the skeleton.
        weights: of the model.

    Raises:
        InputError: a weight is quantized or is no floating-point tensor, scales or LoRA weights stand beside it, or a
            name ends as the names of factors do; names file and tensor.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    weight_names = {name for target, one in weights.stored.items() if target in floating for name in one.names}
    for name, info in weights.tensors.items():
        if _SCALED_DTYPE.match(info.dtype) or (name in weight_names and info.dtype not in DENSE_DTYPES):
            raise InputError(f"{info.file}: tensor {name} is stored as {info.dtype}, quantized; {_ADVICE}")
    for name in weights.unused:
        info = weights.tensors[name]
        if _BESIDE_QUANTIZED.search(name):
            raise InputError(f"{info.file}: tensor {name} belongs to quantized weights; {_ADVICE}")
        if _LORA.search(name):
            raise InputError(
                f"{info.file}: tensor {name} belongs to a LoRA adapter that is not merged; merge_and_unload() the "
                "model in PEFT and save_pretrained it"
            )
        if name.rpartition(".")[2] in FACTOR_SUFFIXES:
            raise InputError(
                f"{info.file}: tensor {name} has the name of a factor, and {type(model).__name__} has no such tensor: "
                "the model is compressed already, or has weight normalization; start from a dense model"
            )
