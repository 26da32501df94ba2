"""The dense model on disk: its skeleton, its towers, and its weights one layer at a time."""

import itertools
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.families import DUAL_ENCODERS
from pgsvd_vllm.hf.moe_unstack import can_unstack, unstack_experts
from pgsvd_vllm.hf.transformers_compat import (
    CAUSAL_LM_CLASSES,
    IMAGE_TEXT_TO_TEXT_CLASSES,
    Conv1D,
    loaded_dtype,
    skeleton,
    tied_weights,
)
from pgsvd_vllm.offline.model.config_check import (
    refuse_more_layers,
    refuse_other_class,
    refuse_unused_biases,
    unknown_name,
)
from pgsvd_vllm.offline.model.model_folder import read_model_config
from pgsvd_vllm.offline.model.quantized import refuse_other_tensors, refuse_quantized_config
from pgsvd_vllm.offline.model.tensor_names import name_tensors
from pgsvd_vllm.offline.model.towers import LANGUAGE, Tower, find_towers
from pgsvd_vllm.offline.model.weights import StoredWeights, find_tensors
from pgsvd_vllm.offline.options import DTYPES

# Characters of an error of transformers that are shown.
MOST_SHOWN = 300
# Class names of supported models -> the auto class that loads them: language models, vision-language models, and the
# dual encoders that vLLM serves.
KINDS = (
    (CAUSAL_LM_CLASSES, AutoModelForCausalLM),
    (IMAGE_TEXT_TO_TEXT_CLASSES, AutoModelForImageTextToText),
    (set(DUAL_ENCODERS), AutoModelForZeroShotImageClassification),
)


class ModelSource:
    """A model on disk, read one layer at a time.

    Args:
        folder: a Hugging Face model folder with safetensors weights.
        trust_remote_code: run modelling code that comes with the model.
        experts: replace stacked MoE experts by linear layers, so that they can be factored.

    Attributes:
        weights: the stored tensors.
        towers: its lists of layers, in the order in which they run.
        layers: the layers of all towers, one tower after the other.
        spans: the layer indexes of each tower, one range per tower.
        paths: the module path of each layer, such as `model.layers.0`.
        model: the skeleton; its parameters are on the meta device until they are loaded.
        weight_dtype: that config.json names; float32 if it names none.
        could_unstack: whether the checkpoint stores the MoE experts one by one.
        unstacks_experts: whether the MoE experts are linear layers in `model`.
        returned: index of a tower's first layer -> number of values in the tuple that its layers return, 0 if they
            return a tensor; known once a `LayerStream` has run the tower.

    Raises:
        InputError: the architecture is not supported, the model is already quantized, or config.json describes another
            model than the weights.
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, experts: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config_json = read_model_config(folder)
        refuse_quantized_config(self.config_json, folder)
        self.auto_class: Any = auto_class_of(self.config_json, folder)
        self.weight_dtype = weight_dtype(self.config_json, folder)
        tensors = find_tensors(folder)
        refuse_more_layers(self.config_json, len(tensors), folder)
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            self.model: PreTrainedModel = skeleton(self.auto_class, self.config, self.weight_dtype, trust_remote_code)
        except Exception as error:  # transformers raises many kinds for a config it cannot use
            raise cannot_build(error, self.config_json, folder, trust_remote_code) from None
        refuse_other_class(self.model, self.config_json, folder)
        self.model.eval()
        transposed = _use_linear(self.model)
        named = name_tensors(self.model, tensors, folder)
        self.could_unstack = can_unstack(self.model, named.headers)
        self.unstacks_experts = experts and unstack_experts(self.model, named.headers)
        if experts and not self.unstacks_experts:
            raise InputError(
                f"`include` experts: {folder} has no MoE whose checkpoint stores expert by expert a gate, an up "
                "and a down projection; omit it"
            )
        self.weights = StoredWeights(folder, named, self.model, transposed)
        refuse_other_tensors(self.model, self.weights)
        self.weights.check_headers()
        refuse_unused_biases(self.model, self.weights)
        self.towers: list[Tower] = find_towers(self.model)
        if LANGUAGE not in [tower.name for tower in self.towers]:
            raise InputError(f"{folder}: no list of decoder layers with nn.Linear projections was found")
        ends = list(itertools.accumulate((len(tower.layers) for tower in self.towers), initial=0))
        self.spans = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self.layers: list[nn.Module] = [layer for tower in self.towers for layer in tower.layers]
        self.paths = [path for tower in self.towers for path in tower.paths]
        self.returned: dict[int, int] = {}
        self._outer: tuple[torch.device, torch.dtype] | None = None

    @property
    def reads_images(self) -> bool:
        """Whether it is a vision-language model or a dual encoder."""
        return len(self.towers) > 1

    @property
    def is_dual_encoder(self) -> bool:
        """Whether it is a dual encoder, which embeds images and texts and generates nothing (CLIP, SigLIP)."""
        return self.auto_class is AutoModelForZeroShotImageClassification

    def is_tied(self, name: str) -> bool:
        """Whether a tensor of the model is an alias of another one, such as the weight of a tied LM head."""
        return name in tied_weights(self.model)

    def tower(self, index: int) -> Tower:
        """The tower that layer `index` belongs to."""
        return next(tower for tower, span in zip(self.towers, self.spans, strict=True) if index in span)

    def span(self, index: int) -> range:
        """The indexes of all layers of the tower that layer `index` belongs to."""
        return next(span for span in self.spans if index in span)

    @property
    def placeholders(self) -> set[int]:
        """The ids of placeholder tokens for images and videos."""
        names = ("image_token_id", "image_token_index", "video_token_id")
        return {token for name in names if (token := getattr(self.config, name, None)) is not None}

    @property
    def vocabulary(self) -> int:
        """Rows of the input embeddings."""
        if self.is_dual_encoder:  # transformers returns no input embeddings for these models
            return int(self.config.get_text_config().vocab_size)
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def lm_head_numel(self) -> int:
        """Parameters of an LM head that is not tied to the embeddings; 0 if there is none."""
        head: Any = self.model.get_output_embeddings()
        path = next((name for name, module in self.model.named_modules() if module is head), "")
        return 0 if head is None or self.is_tied(f"{path}.weight") else head.weight.numel()

    def other_numel(self, known: set[str]) -> int:
        """Parameters of matrices inside the layers that are not in `known`, such as routers and stacked MoE experts.

        Args:
            known: parameter names.
        """
        layers = zip(self.paths, self.layers, strict=True)
        named = (pair for path, layer in layers for pair in layer.named_parameters(prefix=path))
        return sum(parameter.numel() for name, parameter in named if parameter.dim() > 1 and name not in known)

    def _read(self, name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A floating-point tensor of the model as transformers loads it in `dtype`, others in their own dtype."""
        tensor = self.weights.shaped(name, shape)
        return tensor.to(device, loaded_dtype(self.model, name, dtype) if tensor.is_floating_point() else tensor.dtype)

    def _load(self, module: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        for name, parameter in list(module.named_parameters()):
            _set(module, name, self._read(f"{prefix}{name}", parameter.shape, device, dtype))
        module.to(device)

    def load_outer(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load all parameters outside the layers except the LM head, and all stored buffers, such as a router's bias.

        It does nothing if they are loaded already.

        Raises:
            InputError: a tensor is missing, has the wrong shape, or is not finite.
        """
        if self._outer == (device, dtype):
            return
        self._outer = device, dtype
        layers = {id(p) for layer in self.layers for p in layer.parameters()}
        head = self.model.get_output_embeddings()
        skipped = {id(p) for p in head.parameters()} if head is not None else set()
        tied = tied_weights(self.model)
        for name, parameter in list(self.model.named_parameters()):
            if id(parameter) in layers or name in tied:
                continue
            if id(parameter) in skipped:
                self.weights.check_shape(name, parameter.shape)
                continue
            _set(self.model, name, self._read(name, parameter.shape, device, dtype))
        stored = self.model.state_dict().keys() & self.weights.stored.keys()
        for name, buffer in list(self.model.named_buffers()):
            loaded = self._read(name, buffer.shape, device, dtype) if name in stored else buffer.to(device)
            _set(self.model, name, loaded)

    def load_lm_head(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the LM head, if there is one; raises InputError as `load_outer`, which leaves it out."""
        head: Any = self.model.get_output_embeddings()
        if head is None:
            return
        tied = tied_weights(self.model)
        path = next(name for name, module in self.model.named_modules() if module is head)
        for name, parameter in list(head.named_parameters()):
            origin = tied.get(f"{path}.{name}")
            if origin is None:
                _set(head, name, self._read(f"{path}.{name}", parameter.shape, device, dtype))
            else:
                _set(head, name, self.model.get_parameter(origin).data)

    def whole(self, device: torch.device, dtype: torch.dtype) -> Any:
        """A copy of the whole model, for work that cannot go layer by layer; raises as transformers does."""
        model: Any = self.auto_class.from_pretrained(self.folder, dtype=dtype, trust_remote_code=self.trust_remote_code)
        return model.eval().to(device)

    @contextmanager
    def layer(self, index: int, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Layer `index` with its weights on `device` in `dtype`; they are freed at the end of the context.

        Raises:
            InputError: a tensor is missing, has the wrong shape, or is not finite.
        """
        layer = self.layers[index]
        self._load(layer, f"{self.paths[index]}.", device, dtype)
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _set(layer, name, torch.empty_like(parameter, device="meta"))


def needs_code(folder: Path) -> InputError:
    """The error for a model that cannot be built without the code of its repository."""
    return InputError(
        f"{folder}/config.json: the model needs modelling code from its own repository; read it, then allow it to run "
        "with `trust_remote_code`"
    )


def cannot_build(error: Exception, config: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> InputError:
    """The error for a model that transformers cannot build, with the reason.

    Args:
        error: of transformers.
        config: config.json of the model.
        folder: of the model.
        trust_remote_code: whether its modelling code may run.
    """
    path = folder / "config.json"
    if "auto_map" in config and not trust_remote_code and "trust_remote_code" in str(error):
        return needs_code(folder)
    if not config.get("model_type"):
        return InputError(f"{path}: model_type is missing or empty; transformers cannot build the model without it")
    if not isinstance(config["model_type"], str):
        return InputError(f'{path}: model_type is {config["model_type"]!r}, not a name such as "llama"')
    # For an unknown class transformers lists all that it knows.
    reason = unknown_name(config, error) or textwrap.shorten(str(error), MOST_SHOWN, placeholder=" ...")
    return InputError(f"{path}: transformers cannot build this model: {reason}")


def auto_class_of(config: Mapping[str, Any], folder: Path) -> Any:
    """The auto class of transformers that loads a model; raises InputError if it cannot be compressed.

    Args:
        config: config.json as read.
        folder: of the model, for errors.
    """
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    for names, auto_class in KINDS:
        if any(name in names for name in architectures):
            return auto_class
    if "auto_map" in config:
        return AutoModelForCausalLM
    if not any(architectures):
        raise InputError(
            f"{folder}/config.json: architectures is missing or empty; it must be a list with the name of the "
            'model\'s class in transformers, such as ["LlamaForCausalLM"]'
        )
    raise InputError(
        f"{folder}/config.json: architecture {', '.join(architectures)} is not supported; "
        "supported are causal language models and vision-language models of transformers, CLIP and SigLIP"
    )


def weight_dtype(config: Mapping[str, Any], folder: Path) -> torch.dtype:
    """The dtype that a config.json names, float32 if it names none; raises InputError if weights cannot have it."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    name = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "auto")
    if name == "auto" or isinstance(name, dict):  # a dict has one dtype per part of the model
        return torch.float32
    dtype = {**DTYPES, "float64": torch.float64}.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise InputError(
            f"{folder}/config.json: dtype {name!r} is none of float32, bfloat16 and float16; write the dtype of the "
            "weights there, which must be dense"
        )
    return dtype


def _use_linear(model: nn.Module) -> set[str]:
    """Replace GPT-2's transposed layers by nn.Linear; returns the names of their weights."""
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
