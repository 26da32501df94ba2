"""The model to compress: where its files are, its skeleton, and its weights one layer at a time."""

import fnmatch
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.families import STAYS_DENSE
from pgsvd_vllm.format.reader import TensorInfo, read_config, read_headers, read_index
from pgsvd_vllm.hf.moe_unstack import UnstackedExperts, can_unstack, unstack_experts
from pgsvd_vllm.hf.weight_mapping import StoredTensor, stored_tensors
from pgsvd_vllm.offline.model.projection import LM_HEAD, Projection
from pgsvd_vllm.offline.model.towers import LANGUAGE, Tower, find_towers

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What is compressed: models that generate text, from text alone or from images too, and those that compare both.
KINDS = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    # Of those that compare, what vLLM can serve.
    ({"clip": "CLIPModel", "siglip": "SiglipModel"}, AutoModelForZeroShotImageClassification),
)


class ModelSource:
    """A model on disk, read one layer at a time.

    Args:
        folder: a Hugging Face model folder with safetensors weights.
        trust_remote_code: run modelling code that comes with the model.
        experts: take the experts of mixtures for projections as well.

    Attributes:
        tensors: tensor name -> header entry.
        towers: its lists of layers, in the order in which they can run.
        layers: the layers of all towers, one tower after the other.
        spans: their indexes, a range a tower.
        paths: their module paths, such as `model.layers.0`.
        model: the skeleton; its parameters are on the meta device unless materialised.
        stored: tensor name of the model -> where the checkpoint has it.
        transposed: names of weights that the checkpoint has as [in, out].
        could_split, splits: whether experts could be projections, and whether they are.

    Raises:
        CheckpointError: config.json or a weight file is missing or damaged.
        InputError: the architecture is not one this tool can compress.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, experts: bool = False) -> None:
        self.folder = folder
        self.config_json = read_config(folder)
        self.auto_class: Any = self._kind()
        if (folder / INDEX_FILE).is_file():
            self.tensors: dict[str, TensorInfo] = read_index(folder, INDEX_FILE)
        elif (folder / SINGLE_FILE).is_file():
            self.tensors = read_headers(folder / SINGLE_FILE)
        else:
            raise InputError(
                f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}; other weight formats (such as .bin) are not "
                "read: load the model in transformers and save_pretrained it"
            )
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with init_empty_weights(include_buffers=False), no_init_weights():
                self.model: PreTrainedModel = self.auto_class.from_config(
                    self.config, trust_remote_code=trust_remote_code, dtype=self.weight_dtype
                )
        except Exception as error:  # transformers raises many kinds for a config it cannot use
            raise InputError(f"{folder}/config.json: transformers cannot build this model: {error}") from None
        self.model.eval()
        self.transposed = _use_linear(self.model)
        self.could_split = can_unstack(self.model, self.tensors)
        self.splits = experts and unstack_experts(self.model, self.tensors)
        if experts and not self.splits:
            raise InputError(
                f"--include experts: {folder} has no mixture whose checkpoint stores expert by expert a gate, an up "
                "and a down projection; leave it out"
            )
        self.stored = stored_tensors(self.model, list(self.tensors))
        self.towers: list[Tower] = find_towers(self.model)
        if LANGUAGE not in [tower.name for tower in self.towers]:
            raise InputError(f"{folder}: no list of equal decoder layers with nn.Linear projections was found")
        ends = list(itertools.accumulate((len(tower.layers) for tower in self.towers), initial=0))
        self.spans = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self.layers: list[nn.Module] = [layer for tower in self.towers for layer in tower.layers]
        self.paths = [path for tower in self.towers for path in tower.paths]

    @property
    def sees(self) -> bool:
        """Whether the model reads images."""
        return len(self.towers) > 1

    @property
    def compares(self) -> bool:
        """Whether the model compares images with texts, and generates nothing."""
        return self.auto_class is AutoModelForZeroShotImageClassification

    def tower(self, index: int) -> Tower:
        """The tower that layer `index` belongs to."""
        return next(tower for tower, span in zip(self.towers, self.spans, strict=True) if index in span)

    def span(self, index: int) -> range:
        """The indexes of all layers of that tower."""
        return next(span for span in self.spans if index in span)

    @property
    def placeholders(self) -> set[int]:
        """The ids of tokens that stand where an image goes in."""
        names = ("image_token_id", "image_token_index", "video_token_id")
        return {token for name in names if (token := getattr(self.config, name, None)) is not None}

    def _kind(self) -> Any:
        """The class of transformers that loads the model; raises InputError where it cannot be compressed."""
        config = self.config_json
        section = config.get("quantization_config")
        if section is not None:
            method = section.get("quant_method") if isinstance(section, dict) else section
            raise InputError(f"{self.folder}: already compressed or quantized ({method}); start from the dense model")
        named = config.get("architectures")
        architectures = [str(name) for name in named] if isinstance(named, list) else []
        for names, auto_class in KINDS:
            if any(name in names.values() for name in architectures):
                return auto_class
        if "auto_map" in config:
            return AutoModelForCausalLM
        raise InputError(
            f"{self.folder}/config.json: architecture {', '.join(architectures) or 'missing'} is not a causal "
            "language model of transformers, with or without images, nor CLIP or SigLIP; only those can be compressed"
        )

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that config.json names, float32 if none."""
        name = self.config_json.get("dtype") or self.config_json.get("torch_dtype") or "float32"
        return getattr(torch, str(name).removeprefix("torch."), torch.float32)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embeddings."""
        if self.compares:  # those models do not tell which of their embeddings are of words
            return int(self.config.get_text_config().vocab_size)
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    def projections(self, ignore: Sequence[str] = ()) -> list[list[Projection]]:
        """The linear layers of every layer, in order, less those that match `ignore`.

        Args:
            ignore: shell patterns matched against the module's name, such as `*.down_proj`.

        Raises:
            InputError: a pattern matches nothing, or nothing is left.
        """
        matched: set[str] = set()
        found: list[list[Projection]] = []
        for index, layer in enumerate(self.layers):
            row = []
            tower = self.tower(index).name
            mixtures = [f"{name}." for name, module in layer.named_modules() if isinstance(module, UnstackedExperts)]
            for name, module in layer.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                path = f"{self.paths[index]}.{name}"
                full = self._checkpoint_name(path)
                if full is None:
                    continue
                hits = [p for p in ignore if fnmatch.fnmatchcase(full, p) or fnmatch.fnmatchcase(name, p)]
                matched.update(hits)
                if not hits and not fnmatch.fnmatchcase(path, STAYS_DENSE.get(self.config.model_type, "")):
                    reach = self._reach if name.startswith(tuple(mixtures)) else 1.0
                    row.append(Projection(full, module.out_features, module.in_features, path, tower, reach))
            found.append(row)
        for pattern in ignore:
            if pattern not in matched:
                raise InputError(f"--ignore {pattern}: matches no linear layer, for example {self._example()}")
        if not any(found):
            raise InputError("--ignore: every linear layer is ignored, nothing is left to compress")
        return found

    def head(self) -> Projection:
        """The output head; raises InputError where there is none of its own."""
        module = self.model.get_output_embeddings()
        path = next((name for name, one in self.model.named_modules() if one is module), "")
        if not isinstance(module, nn.Linear):
            raise InputError(f"--include lm_head: {self.folder} has no output head; leave it out")
        if f"{path}.weight" in (getattr(self.model, "all_tied_weights_keys", None) or {}):
            raise InputError(
                f"--include lm_head: {self.folder} shares its output head with the input embeddings, which must stay: "
                "factors would only come on top; leave it out"
            )
        name = self.stored_as(f"{path}.weight")[0].removesuffix(".weight")
        return Projection(name, module.out_features, module.in_features, path, LM_HEAD)

    @property
    def _reach(self) -> float:
        """Share of the tokens that reach an expert, on average."""
        count = next(len(module) for module in self.model.modules() if isinstance(module, UnstackedExperts))
        chosen = getattr(self.config.get_text_config(), "num_experts_per_tok", None) or 1
        return min((max(chosen) if isinstance(chosen, list) else chosen) / count, 1.0)

    def _checkpoint_name(self, path: str) -> str | None:
        """What vLLM knows a projection by: its name in the checkpoint; None where that has no matrix of it alone."""
        stored = self.stored.get(f"{path}.weight")
        if stored is None:
            return path
        if stored.converter is not None:
            return None
        name = stored.names[0].removesuffix(".weight")
        prefix = f"{self.model.base_model_prefix}."
        return path if name.removeprefix(prefix) == path.removeprefix(prefix) else name

    def _example(self) -> str:
        name = next(n for n, m in self.layers[-1].named_modules() if isinstance(m, nn.Linear))
        path = f"{self.paths[-1]}.{name}"
        return self._checkpoint_name(path) or path

    def header(self, name: str) -> TensorInfo:
        """Where a tensor of the model lies; raises InputError where it is missing."""
        return self.tensors[self._stored(name).names[0]]

    def _stored(self, name: str) -> StoredTensor:
        stored = self.stored.get(name)
        if stored is None:
            raise InputError(f"{self.folder}: tensor {name} that the architecture needs is missing")
        return stored

    def stored_as(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that a tensor of the model is made of; raises InputError where it is missing."""
        return self._stored(name).names

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the model, checked to be finite.

        Raises:
            InputError: it is missing, or holds NaN or infinity; names the tensor and the file.
        """
        stored = self._stored(name)
        try:
            made = stored.made(name, self.read, self.model)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.folder}: tensor {name} cannot be made of {', '.join(stored.names[:2])}, ...: {error}"
            ) from None
        return made.T.contiguous() if name in self.transposed else made

    def read(self, name: str) -> torch.Tensor:
        """One tensor as the checkpoint has it, checked to be finite.

        Raises:
            InputError: it holds NaN or infinity; names the tensor and the file.
        """
        info = self.tensors[name]
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def _read_shaped(self, name: str, shape: torch.Size) -> torch.Tensor:
        if self._stored(name).converter is None:
            self._check_shape(name, shape)
        tensor = self.tensor(name)
        if tensor.shape != shape:
            raise InputError(
                f"{self.folder}: tensor {name} becomes {tuple(tensor.shape)}, the architecture needs {tuple(shape)}"
            )
        return tensor

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        found = self.header(name).shape
        if (found[::-1] if name in self.transposed else found) != tuple(shape):
            raise InputError(f"{self.folder}: tensor {name} has shape {found}, the architecture needs {tuple(shape)}")

    def _load(self, module: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        for name, parameter in list(module.named_parameters()):
            _set(module, name, self._read_shaped(f"{prefix}{name}", parameter.shape).to(device, dtype))
        module.to(device)

    def load_outer(self, device: torch.device, dtype: torch.dtype) -> None:
        """Materialise everything outside the layers but the output head."""
        layers = {id(p) for layer in self.layers for p in layer.parameters()}
        head = self.model.get_output_embeddings()
        skipped = {id(p) for p in head.parameters()} if head is not None else set()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for name, parameter in list(self.model.named_parameters()):
            if id(parameter) in layers or name in tied:
                continue
            if id(parameter) in skipped:
                self._check_shape(name, parameter.shape)
                continue
            _set(self.model, name, self._read_shaped(name, parameter.shape).to(device, dtype))
        for name, buffer in list(self.model.named_buffers()):
            _set(self.model, name, buffer.to(device))

    def load_head(self, device: torch.device, dtype: torch.dtype) -> None:
        """Materialise the output head, which `load_outer` leaves out, where there is one."""
        head: Any = self.model.get_output_embeddings()
        if head is None:
            return
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        path = next(name for name, module in self.model.named_modules() if module is head)
        for name, parameter in list(head.named_parameters()):
            origin = tied.get(f"{path}.{name}")
            if origin is None:
                _set(head, name, self._read_shaped(f"{path}.{name}", parameter.shape).to(device, dtype))
            else:
                _set(head, name, self.model.get_parameter(origin).data)

    @contextmanager
    def layer(self, index: int, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Layer `index` with its weights on `device` in `dtype`; they are freed on leaving."""
        layer = self.layers[index]
        self._load(layer, f"{self.paths[index]}.", device, dtype)
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _set(layer, name, torch.empty_like(parameter, device="meta"))


def _use_linear(model: nn.Module) -> set[str]:
    """Put nn.Linear in place of GPT-2's transposed layers; the names of their weights."""
    transposed = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            columns, out = module.weight.shape
            model.set_submodule(name, nn.Linear(columns, out, device="meta", dtype=module.weight.dtype))
            transposed.add(f"{name}.weight")
    return transposed


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` of `module`."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


logging.getLogger("accelerate").setLevel(logging.ERROR)
