"""The forward passes of one layer on all batches, as the error-aware fit needs them: paused before projections, or
repeated where their activations do not fit into memory.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils.hooks import RemovableHandle

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.layer_calls import StopForward

# Runs the dense layer on a batch up to a projection; returns its input, and outputs of projections up to it.
Repeat = Callable[[int, str], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass
class DenseActivations:
    """Activations of the dense layer: hidden states before it, and inputs and outputs of some projections.

    Attributes:
        hidden: of all batches.
        inputs: projection -> its inputs, of the batches that are kept.
        outputs: projection -> its outputs, of the batches that are kept.
        repeat: for the other batches, if there are any.
    """

    hidden: list[torch.Tensor]
    inputs: dict[str, list[torch.Tensor]]
    outputs: dict[str, list[torch.Tensor]]
    repeat: Repeat | None

    def at(self, i: int, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The input of a projection in batch `i`, and the outputs of the projections of `outputs` up to it.

        Raises:
            InputError: the dense layer has called the projection for fewer batches.
        """
        kept = self.inputs[name]
        if i < len(kept):
            return kept[i], {one: outputs[i] for one, outputs in self.outputs.items()}
        if self.repeat is None:
            raise other_tokens(name)
        return self.repeat(i, name)


def repeater(
    layer: nn.Module,
    modules: Mapping[str, nn.Module],
    outputs: Sequence[str],
    run: Callable[[nn.Module, int], torch.Tensor],
) -> Repeat:
    """Repeats the forward passes of a dense layer, on a copy of it, since the layer itself gets factors.

    Args:
        layer: with its dense weights.
        modules: projection -> its module.
        outputs: projections whose outputs are returned.
        run: runs a layer on the dense hidden states of a batch.
    """
    paths = {id(module): path for path, module in layer.named_modules()}
    dense_layer = copy.deepcopy(layer)
    copies = {name: dense_layer.get_submodule(paths[id(module)]) for name, module in modules.items()}

    def repeat(i: int, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs: list[torch.Tensor] = []
        made: dict[str, torch.Tensor] = {}

        def keep(one: str) -> Callable[..., None]:
            return lambda _module, _args, output: made.update({one: output})

        def stop(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs.append(args[0])
            raise StopForward(output)

        handles = [copies[one].register_forward_hook(keep(one)) for one in outputs]
        handles.append(copies[name].register_forward_hook(stop))
        with contextlib.suppress(StopForward):
            try:
                run(dense_layer, i)
            finally:
                remove(handles)
        if not inputs:
            raise other_tokens(name)
        return inputs[0], made

    return repeat


class PausedForward(greenlet):
    """The forward pass of a layer on one batch, which pauses before some projections.

    Attributes:
        outputs: projection -> its output, for the projections called so far whose output is kept.
    """

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        super().__init__(lambda: (None, forward()))
        self.outputs: dict[str, torch.Tensor] = {}

    def run_until(self, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Continue until the layer calls a projection; returns the projection's input [..., in], and `outputs`.

        Raises:
            InputError: the layer calls another projection or none.
        """
        called, value = self.switch()
        if called != name:
            raise other_tokens(name)
        return value, self.outputs

    def finish(self) -> torch.Tensor:
        """Continue to the end; returns the layer's output [..., hidden].

        Raises:
            InputError: the layer calls another projection before it ends.
        """
        name, value = self.switch()
        if name is not None:
            raise other_tokens(name)
        return value


class RepeatedForward:
    """The forward pass of a layer on one batch, which begins anew for each projection and keeps nothing in between."""

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        self._forward = forward

    def _run(self, name: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        run = PausedForward(self._forward)
        called, value = run.switch()
        while called != name:
            if called is None:
                raise other_tokens(name or "")
            called, value = run.switch()
        return value, run.outputs

    def run_until(self, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As of `PausedForward`."""
        return self._run(name)

    def finish(self) -> torch.Tensor:
        """The layer's output [..., hidden]."""
        return self._run(None)[0]


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()
    handles.clear()


def pause_before(name: str) -> Callable[..., None]:
    """A hook that pauses the forward pass and returns a projection's name and input to the caller of `switch`."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        getcurrent().parent.switch((name, args[0]))

    return hook


def keep_output(name: str) -> Callable[..., None]:
    """A hook that keeps a projection's output with its forward pass."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        getcurrent().outputs[name] = output

    return hook


def other_tokens(name: str) -> InputError:
    """The error for a projection whose inputs in the factored layer belong to other tokens than in the dense one."""
    return InputError(
        f"{name}: its tokens depend on the weights before it (a router); "
        f"leave it dense with `ignore` {name}, or use `no_sequential`"
    )
