"""Finds the towers of a model: lists of layers that run in sequence, such as a vision encoder or a language model.

The projector maps the vision encoder's outputs to embeddings of the language model; it is a tower of one layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pgsvd_vllm.families import SERVED_PROJECTORS

LANGUAGE = "language"
PROJECTOR = "projector"


@dataclass(frozen=True)
class Tower:
    """A list of layers, each of which takes the hidden states of the layer before it.

    Attributes:
        name: `language`, `projector`, or the name of this part in the configuration, such as `vision`.
        path: module path of the list, such as `model.layers`, or of the projector.
        layers: the layers of the list, or the projector alone.
    """

    name: str
    path: str
    layers: tuple[nn.Module, ...]

    @property
    def paths(self) -> list[str]:
        """The module paths of the layers."""
        return [self.path] if self.name == PROJECTOR else [f"{self.path}.{i}" for i in range(len(self.layers))]


def find_towers(model: PreTrainedModel) -> list[Tower]:
    """The towers of a model, the language model last; a language model has no others.

    A tower is an outermost list of layers that all contain linear layers. If several lists belong to one part of the
    configuration, the one with the most weights is its tower.
    """
    found: dict[str, tuple[int, Tower]] = {}
    for path, layers in _outermost(model):
        size = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
        name = _part(model, path)
        if size > found.get(name, (0, None))[0]:
            found[name] = size, Tower(name, path, tuple(layers))
    towers = [tower for _, tower in found.values()]
    projector = _projector(model, [tower.path for tower in towers])
    if projector is not None and LANGUAGE in found:
        towers.append(projector)
    return sorted(towers, key=lambda tower: (tower.name == LANGUAGE, tower.name == PROJECTOR))


def _projector(model: PreTrainedModel, towers: list[str]) -> Tower | None:
    """The last module with linear layers before the language model, outside all towers; None for other model types."""
    if len(towers) < 2 or model.config.model_type not in SERVED_PROJECTORS:
        return None
    text = type(model.config.get_text_config())
    last = None
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and isinstance(module.config, text):
            break
        outside = not any(f"{tower}.".startswith(f"{path}.") or path.startswith(f"{tower}.") for tower in towers)
        inside = last is not None and path.startswith(f"{last.path}.")
        if path and outside and not inside and any(isinstance(m, nn.Linear) for m in module.modules()):
            last = Tower(PROJECTOR, path, (module,))
    return last


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Path and list of every list of layers with linear layers inside that lies in no other such list."""
    known: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{other}.") for other in known):
            continue
        if len(module) and all(map(_has_linear, module)):
            known.append(path)
            yield path, module


def _has_linear(layer: nn.Module) -> bool:
    """Whether a module contains linear layers; a linear layer itself does not."""
    return any(isinstance(m, nn.Linear) for m in layer.modules() if m is not layer)


def _part(model: PreTrainedModel, path: str) -> str:
    """The part of the configuration, such as `vision`, that describes the innermost model around a module."""
    parts = {type(getattr(model.config, key)): key for key in model.config.sub_configs}
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        key = parts.get(type(owner.config)) if isinstance(owner, PreTrainedModel) else None
        if key is not None:
            return LANGUAGE if key == "text_config" else key.removesuffix("_config")
    return LANGUAGE
