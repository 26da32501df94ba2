"""Tells what a folder holds instead of a dense transformers model in safetensors, and how to make one of it."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.format.reader import read_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# The first bytes of the file that git stores in place of a large one.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_SAVE = "load it in transformers and save_pretrained it"
# Patterns of files -> what a folder holds that has one of them but no config.json, or no safetensors weights, and what
# to do; the first row that matches is meant.
OTHER_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("*.incomplete", ".cache/huggingface/download/*.incomplete", "*.aria2", "*.crdownload", "*.part"),
        "an interrupted download; repeat it",
    ),
    (
        ("run.json",),
        "the unfinished work of a pgsvd-vllm run; continue the run with `resume`",
    ),
    (
        ("pgsvd-*.safetensors",),
        "a compressed model; start from the dense model that it was made from",
    ),
    (
        ("model_index.json",),
        "a diffusers pipeline; only language models, vision-language models, CLIP and SigLIP can be compressed",
    ),
    (
        ("gptq_model*", "quantize_config.json", "quant_config.json"),
        "a quantized model; start from the dense model that it was made from",
    ),
    (
        ("*.gguf",),
        "GGUF weights; start from the safetensors model that they were made from, or dequantize them: "
        "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(DIR)",
    ),
    (
        ("consolidated*", "params.json"),
        "weights in their maker's own format (params.json, consolidated files); take the version for transformers, or "
        "convert them with the script convert_..._weights_to_hf.py of the model's folder in transformers",
    ),
    (
        ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
        f"weights in pytorch_model.bin files, which are not supported; convert the model to safetensors: {_SAVE}",
    ),
    (
        ("modules.json", "config_sentence_transformers.json"),
        "a sentence-transformers model; pass the folder of its transformer, which must be a causal language model",
    ),
    (
        ("*.onnx", "onnx/*.onnx", "openvino_model*"),
        "an ONNX or OpenVINO export; start from the safetensors model that it was made from",
    ),
    (
        ("tf_model*.h5", "flax_model*.msgpack", "saved_model.pb", "*.tflite", "*.ckpt.index", "*.ckpt.meta"),
        "TensorFlow or Flax weights; take a version in safetensors, or convert them with transformers 4",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "*.distcp", "mp_rank_*", "pytorch_model_fsdp*"),
        "a training checkpoint in pieces (DeepSpeed, FSDP); join them first, then save_pretrained the model",
    ),
    (
        ("*.pth", "*.pt", "*.ckpt", "*.bin", "*.nemo"),
        f"weights in PyTorch's own files, which are not supported; convert the model to safetensors: {_SAVE}",
    ),
    (
        ("model-*-of-*.safetensors",),
        f"shards without {INDEX_FILE}; complete the download",
    ),
    (
        ("model.*.safetensors",),
        f"a variant of the weights; rename its file to {SINGLE_FILE}",
    ),
)  # fmt: skip


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder that may hold something else than a transformers model.

    Raises:
        InputError: the folder holds something else; says what, and what to do.
        CheckpointError: the folder is missing, or config.json is malformed.
    """
    path = folder / "config.json"
    if os.path.isdir(folder):  # unlike Path.is_dir, also for a name that is too long
        if not os.access(folder, os.R_OK | os.X_OK):
            raise InputError(f"{folder}: cannot be read (Permission denied)")
        if (folder / ADAPTER).is_file() and not has_weights(folder):
            raise InputError(_merge_advice(folder))
        if not os.path.lexists(path):
            found = _other_format(folder) or _models_below(folder)
            raise InputError(
                f"{folder}: no config.json, so it is no transformers model{f': it holds {found}' if found else ''}"
            )
        start = refuse_pointer(path)
        for mark, name in MARKS.items():
            if start.startswith(mark):
                raise InputError(f"{path}: begins with a byte-order mark of {name}; save it as UTF-8 without one")
    return read_config(folder)


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors weights under the names of transformers."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def missing_weights(folder: Path) -> InputError:
    """The error for a model folder without safetensors weights."""
    found = _other_format(folder) or f"perhaps other weights, such as .bin, which are not supported: {_SAVE}"
    return InputError(f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}; it holds {found}")


def refuse_pointer(path: Path) -> bytes:
    """The first bytes of a file; raises InputError if it cannot be read or git-lfs has not downloaded it."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path}: cannot be read (it is a pipe or a device)")  # reading might never end
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if start == LFS_POINTER:
        raise InputError(f"{path}: a git-lfs pointer in place of the file; run git lfs pull in {path.parent}")
    return start


def with_download_advice(error: CheckpointError, folder: Path) -> CheckpointError:
    """The error of a missing or damaged weight file, with the advice to repeat an interrupted download."""
    if any(folder.glob("*.incomplete")) or any(folder.glob(".cache/huggingface/download/*.incomplete")):
        return CheckpointError(f"{error}; the download was interrupted, repeat it")
    return error


def _other_format(folder: Path) -> str | None:
    """What a folder holds according to `OTHER_FORMATS`; None if no row matches."""
    for patterns, meaning in OTHER_FORMATS:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return meaning
    return None


def _models_below(folder: Path) -> str | None:
    """The advice to pass a folder below this one, such as a training checkpoint or a snapshot of a hub cache."""
    for pattern in ("*/config.json", "snapshots/*/config.json"):
        found = sorted(folder.glob(pattern), reverse=True)
        if found:
            return f"models in folders of their own; pass one of them, such as {found[0].parent}"
    return None


def _merge_advice(folder: Path) -> str:
    """The message that explains how to merge an adapter into its base model."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    of = f" for {base}" if isinstance(base, str) and base else ""
    return (
        f"{folder}: an adapter (LoRA){of}, not a model; merge it into its base first: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(DIR), and save "
        "the tokenizer there"
    )
