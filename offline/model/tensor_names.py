"""Names the tensors of a checkpoint as its model does: without prefixes of training tools, and tied ones once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import TensorInfo
from pgsvd_vllm.hf.transformers_compat import tied_weights
from pgsvd_vllm.hf.weight_mapping import stored_tensors

# Parts of names that torch.compile, FSDP and activation checkpointing add at any place.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of a checkpoint under the names that its compressed version gives them.

    Attributes:
        headers: name -> header.
        in_file: name -> name in the file.
        duplicates: name in the file of a tied tensor that is stored a second time -> its header and the name of the
            first; `headers` lacks it.
    """

    headers: dict[str, TensorInfo]
    in_file: dict[str, str]
    duplicates: dict[str, tuple[TensorInfo, str]]


def name_tensors(model: PreTrainedModel, tensors: Mapping[str, TensorInfo], folder: Path) -> NamedTensors:
    """Name the tensors of a checkpoint.

    Names that transformers and vLLM both read stay as they are, those that transformers itself renames included.

    Args:
        model: the skeleton.
        tensors: names in the files -> headers.
        folder: to name in errors.

    Raises:
        InputError: two tensors of the checkpoint are one tensor of the model.
    """
    stored = list(tensors)
    names = _with_base_prefix(model, _unwrapped(model, stored))
    in_file: dict[str, str] = {}
    for name, original in zip(names, stored, strict=True):
        if name in in_file:
            raise InputError(f"{folder}: tensors {in_file[name]} and {original} are both {name} of the model")
        in_file[name] = original
    duplicates = {original: (tensors[original], kept) for original, kept in _tie(model, in_file).items()}
    return NamedTensors({name: tensors[original] for name, original in in_file.items()}, in_file, duplicates)


def _unwrapped(model: PreTrainedModel, stored: Sequence[str]) -> list[str]:
    """Names without the parts that training tools add, in front (DDP, PEFT, ...) or at any place."""
    names = [_WRAPPERS.sub("", name) for name in stored]
    own = model.state_dict().keys()
    # The first and the last name in alphabetical order share what all of them share.
    parts = zip(min(names, default="").split(".")[:-1], max(names, default="").split("."), strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], parts)]
    fronts = ("".join(f"{part}." for part in shared[:length]) for length in range(len(shared) + 1))
    choices = [[name.removeprefix(front) for name in names] for front in fronts]

    def known(choice: list[str]) -> tuple[int, int]:
        return len(own & stored_tensors(model, choice).keys()), len(own & set(choice))

    return max(choices, key=known)  # the first of equal ones: as few parts as possible are removed


def _with_base_prefix(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Names with the base model's prefix (`model.` in most models), which all of them may lack.

    transformers adds the prefix while it loads, most of vLLM's models do not. The names stay as they are if
    transformers renames any of them in another way, since vLLM then has rules for these names.
    """
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        return names
    own = model.state_dict().keys()
    target = {}
    for goal, stored in stored_tensors(model, names).items():
        if goal in own:
            target.update(dict.fromkeys(stored.names, goal))
            if stored.converter is None and goal.removeprefix(prefix) != stored.names[0]:
                return names
    # Parts of the base model, such as `layers`, also in the names of tensors that the model does not use.
    parts = {name.partition(".")[0] for name, goal in target.items() if goal.startswith(prefix)}
    return [f"{prefix}{name}" if name.partition(".")[0] in parts else name for name in names]


def _tie(model: PreTrainedModel, in_file: dict[str, str]) -> dict[str, str]:
    """Keep one of each group of tied tensors, under the name of the tensor that the others share.

    Args:
        model: the skeleton.
        in_file: name -> name in the file; it is changed.

    Returns:
        The removed ones: name in the file -> name of the tensor that is kept.
    """
    # vLLM asks the text model's configuration.
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", True):
        return {}
    stored, duplicates = stored_tensors(model, list(in_file)), {}
    for alias, origin in tied_weights(model).items():
        one, other = stored.get(alias), stored.get(origin)
        if one is None or one.converter is not None:
            continue
        name = one.names[0]
        if other is None and name == alias:
            in_file[origin] = in_file.pop(name)
            stored[origin] = stored.pop(alias)
        elif other is not None and other.converter is None and name in in_file and name != other.names[0]:
            duplicates[in_file.pop(name)] = other.names[0]
    return duplicates
