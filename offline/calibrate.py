"""Calibration: the dense model is run layer by layer and the inputs' Gram matrices are summed.

Memory holds one decoder layer, its Gram matrices and the hidden states of the windows, whatever
the depth. Projections that read the same tensor (q, k, v; gate, up) share one matrix, found by the
identity of the tensor they are called with.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model_source import ModelSource, Projection

TOKENS_PER_BATCH = 4096
# A token counts at most this many times the median energy of its window (see `robust_rows`).
ENERGY_CLIP = 10.0
GRAM_BLOCK = 512


@dataclass(frozen=True)
class LayerGrams:
    """Second moments of one decoder layer's inputs.

    Attributes:
        grams: name of a group's first projection -> sum over tokens of x x^T, float64 [in, in].
        leader: projection name -> name of the first projection that reads the same input.
        tokens: tokens summed.
    """

    grams: dict[str, torch.Tensor]
    leader: dict[str, str]
    tokens: int


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """Factors for the rows of x with which no token owns the Gram matrix.

    In some layers the first position carries over 99 % of the inputs' energy (an attention sink);
    any low-rank matrix that is right on that one token would satisfy any tolerance. Each token's
    energy e_t = ||x_t||^2 is clipped to ENERGY_CLIP times the median of its window.

    Args:
        x: float32 [windows, tokens, in].

    Returns:
        float32 [windows, tokens, 1], at most 1.
    """
    energy = x.square().sum(-1, keepdim=True)
    median = energy.median(dim=1, keepdim=True).values
    return (ENERGY_CLIP * median / energy.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0).sqrt()


def by_window(x: torch.Tensor) -> torch.Tensor:
    """A projection's input as float32 [windows, tokens, in]; expert layers get bare rows, one window."""
    return (x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])).float()


def robust_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of a projection's input times their `token_scale`, float32 [windows * tokens, in]."""
    x = by_window(x)
    return (x * token_scale(x)).flatten(0, 1)


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows [in, in] as float64 of a float32 product; blocks below the diagonal are mirrored, not computed.

    Args:
        rows: float32 [tokens, in].
    """
    width = rows.shape[1]
    gram = rows.new_empty(width, width, dtype=torch.float64)
    for start in range(0, width, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, width)
        block = rows[:, start:stop].T @ rows[:, start:]
        gram[start:stop, start:] = block
        gram[start:, start:stop] = block.T
    return gram


class _GramHooks:
    """Hooks on a layer's projections that sum each distinct input once."""

    def __init__(self, layer: nn.Module, projections: Sequence[Projection], prefix: str) -> None:
        self.grams: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._handles = [
            layer.get_submodule(p.name.removeprefix(prefix)).register_forward_pre_hook(self._hook(p.name))
            for p in projections
        ]

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            for tensor, leader in self._seen:
                if tensor is x:
                    self.leader[name] = leader
                    return
            self._seen.append((x, name))
            self.leader[name] = name
            rows = robust_rows(x)
            product = gram_of(rows)
            self.grams[name] = self.grams[name] + product if name in self.grams else product

        return hook

    def end_batch(self) -> None:
        self._seen.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Reached(Exception):
    """Raised by a hook to end a forward at the module whose input or output was wanted."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@contextlib.contextmanager
def _replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer's forward replaced for a while."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _as_taken(value: torch.Tensor, arrived: torch.Tensor, dimensions: int) -> Any:
    """`value` as the model takes a layer's output: in a tuple, if it took the first of what the last layer gave it."""
    return (value,) if arrived.dim() < dimensions else value


def hidden_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [windows, length, hidden] after a model's last layer; its head does not run.

    Args:
        model: a causal language model.
        layers: its decoder layers.
        ids: int64 [windows, length].
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise Reached(output[0] if isinstance(output, tuple) else output)

    handle = layers[-1].register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    except Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise AssertionError("the model ended without its last layer")


def logits_after(model: Any, layers: Sequence[nn.Module], ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What a model makes of the hidden states after its last layer.

    Args:
        model: a causal language model; its layers are not run.
        layers: its decoder layers.
        ids: int64 [windows, length], the tokens behind `hidden`.
        hidden: [windows, length, hidden].

    Returns:
        logits [windows, length, vocabulary].
    """
    calls = 0

    def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == len(layers):
            return _as_taken(hidden, args[0] if args else kwargs["hidden_states"], hidden.dim())
        arrived = args[0] if args else kwargs["hidden_states"]
        return _as_taken(arrived, arrived, hidden.dim())

    with _replaced_forward(layers, skip):
        return model(input_ids=ids, use_cache=False).logits


class LayerStream:
    """Runs windows through a model one decoder layer at a time.

    Args:
        source: the model.
        ids: int64 [windows, length].
        device: where to compute.
        dtype: of weights and activations.

    Raises:
        InputError: from `ModelSource`; also when a layer's output is not finite.
    """

    def __init__(self, source: ModelSource, ids: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.tokens = ids.numel()
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        source.load_outer(device, dtype)
        self.ids = ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))
        self.hidden = [self._embed(part) for part in self.ids]

    @torch.no_grad()
    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer; remembers what every layer is called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []
        layers = list(self.source.layers)

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not calls:
                first.append(hidden)
            calls.append((args[1:], kwargs))
            if len(calls) == len(layers):
                raise Reached(hidden)
            return _as_taken(hidden, hidden, first[0].dim())

        with _replaced_forward(layers, record), contextlib.suppress(Reached):
            self.source.model(input_ids=ids.to(self.device), use_cache=False)
        if len(calls) != len(layers):
            raise InputError(
                f"{self.source.folder}: the model runs {len(calls)} of its {len(layers)} layers in "
                f"{self.source.layers_name}; this architecture is not supported"
            )
        self._calls[ids.shape[0]] = calls
        return first[0]

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of layer `index` for one batch of hidden states [windows, length, hidden]."""
        args, kwargs = self._calls[hidden.shape[0]][index]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [windows, length, vocabulary] for hidden states after the last layer."""
        return logits_after(self.source.model, list(self.source.layers), ids.to(self.device), hidden)

    @torch.no_grad()
    def advance(self, index: int, projections: Sequence[Projection], collect: bool) -> Iterator[int | LayerGrams]:
        """Run layer `index` over all windows, replacing the hidden states by its outputs.

        Yields the number of tokens done after every batch, and at the end, where `collect`, the
        layer's Gram matrices.
        """
        with self.source.layer(index, self.device, self.dtype) as layer:
            hooks = _GramHooks(layer, projections if collect else (), f"{self.source.layers_name}.{index}.")
            try:
                for i, hidden in enumerate(self.hidden):
                    output = self.run(layer, index, hidden)
                    hooks.end_batch()
                    if not torch.isfinite(output).all():
                        raise InputError(
                            f"{self.source.layers_name}.{index}: the layer's output overflows in {self.dtype}; "
                            "calibrate with --dtype float32 or bfloat16"
                        )
                    self.hidden[i] = output
                    yield output.shape[0] * output.shape[1]
            finally:
                hooks.remove()
        if collect:
            missing = [p.name for p in projections if p.name not in hooks.leader]
            if missing:
                raise InputError(f"{missing[0]}: the layer never calls it; leave it dense with --ignore {missing[0]}")
            yield LayerGrams(hooks.grams, hooks.leader, self.tokens)
