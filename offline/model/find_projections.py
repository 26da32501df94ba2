"""Finds the linear layers of a model that can be factored, under the names that vLLM uses."""

import fnmatch
from collections.abc import Collection, Sequence

from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.families import STAYS_DENSE
from pgsvd_vllm.hf.moe_unstack import UnstackedExperts
from pgsvd_vllm.offline.model.projection import LM_HEAD, Projection, ProjectionSet
from pgsvd_vllm.offline.model.source import ModelSource


def find_projections(source: ModelSource, ignore: Sequence[str] = (), others: Collection[str] = ()) -> ProjectionSet:
    """The linear layers of all layers, in order; those that match `ignore` become the set's ignored ones.

    Args:
        source: the model.
        ignore: shell patterns matched against the module's name, such as `*.down_proj`.
        others: module paths of linear layers that are no projections, as `other_roles` finds them.

    Raises:
        InputError: a pattern matches no linear layer, or every linear layer is ignored.
    """
    matched: set[str] = set()
    layers: list[list[Projection]] = []
    ignored: list[Projection] = []
    expert_reach = _expert_reach(source)
    for index, layer in enumerate(source.layers):
        row: list[Projection] = []
        tower = source.tower(index).name
        moe = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, UnstackedExperts))
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            path = f"{source.paths[index]}.{name}"
            full = checkpoint_name(source, path)
            if full is None:
                continue
            hits = [p for p in ignore if fnmatch.fnmatchcase(full, p) or fnmatch.fnmatchcase(name, p)]
            matched.update(hits)
            if path in others or fnmatch.fnmatchcase(path, STAYS_DENSE.get(source.config.model_type, "")):
                continue
            reach = expert_reach if name.startswith(moe) else 1.0
            projection = Projection(full, module.out_features, module.in_features, path, tower, reach)
            (ignored if hits else row).append(projection)
        layers.append(row)
    for pattern in ignore:
        if pattern not in matched:
            raise InputError(f"`ignore` {pattern}: matches no linear layer, for example {_example(source)}")
    if not any(layers):
        raise InputError("`ignore`: every linear layer is ignored, nothing is left to compress")
    return ProjectionSet(layers, ignored)


def find_lm_head(source: ModelSource) -> Projection:
    """The LM head as a projection.

    Raises:
        InputError: the model has no LM head, or it is tied to the input embeddings.
    """
    module = source.model.get_output_embeddings()
    path = next((name for name, one in source.model.named_modules() if one is module), "")
    if not isinstance(module, nn.Linear):
        raise InputError(f"`include` lm_head: {source.folder} has no LM head; omit it")
    if source.is_tied(f"{path}.weight"):
        raise InputError(
            f"`include` lm_head: {source.folder} ties its LM head to the input embeddings, which must stay dense: "
            "factors would only add parameters; omit it"
        )
    name = source.weights.stored_as(f"{path}.weight")[0].removesuffix(".weight")
    return Projection(name, module.out_features, module.in_features, path, LM_HEAD)


def checkpoint_name(source: ModelSource, path: str) -> str | None:
    """The name of a linear layer in the checkpoint and in vLLM.

    Args:
        source: the model.
        path: module path in the transformers model.

    Returns:
        The name without `.weight`; None if the layer shares its stored matrix with others.
    """
    stored = source.weights.stored.get(f"{path}.weight")
    if stored is None:
        return path
    if stored.converter is not None:
        return None
    name = stored.names[0].removesuffix(".weight")
    prefix = f"{source.model.base_model_prefix}."
    return path if name.removeprefix(prefix) == path.removeprefix(prefix) else name


def _expert_reach(source: ModelSource) -> float:
    """Average share of the tokens that the router sends to one MoE expert; 1 if the experts are not unstacked."""
    count = next((len(module) for module in source.model.modules() if isinstance(module, UnstackedExperts)), None)
    if count is None:
        return 1.0
    chosen = getattr(source.config.get_text_config(), "num_experts_per_tok", None) or 1
    return min((max(chosen) if isinstance(chosen, list) else chosen) / count, 1.0)


def _example(source: ModelSource) -> str:
    """The name of one linear layer, for an error message."""
    name = next(n for n, m in source.layers[-1].named_modules() if isinstance(m, nn.Linear))
    path = f"{source.paths[-1]}.{name}"
    return checkpoint_name(source, path) or path
