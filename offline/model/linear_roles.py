"""Observes what the linear layers of a model do, to tell projections from routers, gates and state-space parts.

One layer of each kind runs with its weights on a short batch, before any other work. A linear layer is a projection if
its layer calls it once, with one tensor, and it returns that tensor times its whole weight; if nothing else reads the
weight; and if its output is more than a choice between experts or tokens.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see the ops that run on a tensor
from torch.utils._pytree import tree_leaves  # the tensors among any arguments

from pgsvd_vllm.families import EXPERTS
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.offline.model.layerwise import Flow, LayerStream

# ATen's ops that return positions.
CHOOSING = {"topk", "sort", "argsort", "argmax", "argmin", "kthvalue"}
# Largest norm of the difference between a projection's output and its input times its weight, relative to the output.
SAME = 1e-2


def other_roles(stream: LayerStream) -> dict[str, str]:
    """The linear layers that are no projections.

    Args:
        stream: of one small batch, which has run no layer.

    Returns:
        module path -> what it is instead, in words, for the layers that the batch reaches.

    Raises:
        InputError: the layers of the model exchange more than hidden states, or do not run.
    """
    found: dict[str, str] = {}
    flow, source = Flow(), stream.source
    for span in source.spans:
        with _untouched(stream, span):
            stream.enter(span.start, flow)
        if not flow.members:
            continue
        entry = flow.hidden[0]
        known: dict[Any, tuple[dict[str, str], torch.Tensor]] = {}
        for index in span:
            kind = _kind(source.layers[index])
            if kind not in known:
                known[kind] = _observe(stream, index, flow.members[0], entry)
            roles, output = known[kind]
            found |= {f"{source.paths[index]}.{name}".removesuffix("."): role for name, role in roles.items()}
            flow.hidden = [output]
            stream.leave(index, flow)
    return found


@contextlib.contextmanager
def _untouched(stream: LayerStream, span: range) -> Iterator[None]:
    """Refuse a model that reads the weights of its layers itself, outside of them; raises InputError."""
    named = ((stream.source.paths[i], stream.source.layers[i]) for i in span)
    watched = {
        f"{path}.{name}": _Watched(m) for path, layer in named for name, m in layer.named_modules() if _is_linear(m)
    }
    try:
        yield
    finally:
        for one in watched.values():
            one.release()
    read = next((path for path, one in watched.items() if one.fault), None)
    if read is not None:
        raise stream.unsupported(f"the model reads {read}.weight outside of its layer")


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear)


def _kind(layer: nn.Module) -> Any:
    """A key that is equal for layers of equal modules, shapes and switches."""
    return tuple(
        (
            *(name, type(module)),
            tuple((key, parameter.shape) for key, parameter in module.named_parameters(recurse=False)),
            tuple((key, value) for key, value in vars(module).items() if isinstance(value, bool | str)),
        )
        for name, module in layer.named_modules()
    )


def _observe(stream: LayerStream, index: int, number: int, hidden: torch.Tensor) -> tuple[dict[str, str], torch.Tensor]:
    """The roles of a layer's linear layers that are no projections, and the layer's output for `hidden`."""
    with stream.source.layer(index, stream.device, stream.dtype) as layer:
        watched = {name: _Watched(m) for name, m in layer.named_modules() if _is_linear(m)}
        try:
            with _Choices(watched) as choices, torch.no_grad():
                output = stream.try_layer(layer, index, number, hidden)
        finally:
            for one in watched.values():
                one.release()
        roles = {name: role for name, one in watched.items() if (role := one.role(EXPERTS in f".{name}."))}
        roles |= dict.fromkeys(choices.found, "a router")
        called = {name: one.module for name, one in watched.items() if one.calls and name not in roles}
        only = _without_gradient(called, lambda x: stream.run(layer, index, number, x), hidden)
        return roles | dict.fromkeys(only, "used for a choice alone"), output


class _Reads(dict[str, Any]):
    """The parameters of a linear layer; tells its watcher when the weight is looked up."""

    def __init__(self, parameters: Mapping[str, Any], watcher: "_Watched") -> None:
        super().__init__(parameters)
        self._watcher = watcher

    def __getitem__(self, name: str) -> Any:
        if name == "weight" and not self._watcher.inside:
            self._watcher.fault = "a matrix that is read as well"
        return super().__getitem__(name)


class _Watched:
    """Watches the calls of a linear layer and the reads of its weight.

    Attributes:
        module: the linear layer.
        calls: so far.
        inside: whether it runs now.
        fault: what else it is than a projection, in words.
        output: of the last call.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.calls, self.inside, self.fault = module, 0, False, ""
        self.output: torch.Tensor | None = None
        self._parameters: Any = module._parameters
        vars(module)["_parameters"] = _Reads(self._parameters, self)
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        self.inside, self.calls = True, self.calls + 1

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor):
            self.fault = "a layer that takes or returns more than one tensor"
        elif not _is_plain(module, args[0], output):
            self.fault = "a layer that is no plain GEMM"
        else:
            self.output = output
        self.inside = False

    def role(self, routed: bool) -> str:
        """What it is instead of a projection, else empty; `routed` for an MoE expert, which may get no token."""
        if self.fault:
            return self.fault
        if self.calls > 1:
            return f"a layer that is called {self.calls} times"
        return "a layer that is never called" if not self.calls and not routed else ""

    def release(self) -> None:
        """Stop watching."""
        vars(self.module)["_parameters"] = self._parameters
        for handle in self._handles:
            handle.remove()


def _is_plain(module: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether y is x W^T + b."""
    if not x.is_floating_point() or x.shape[-1] != module.in_features or y.shape != (*x.shape[:-1], len(module.weight)):
        return False
    expected = F.linear(x.to(module.weight.dtype), module.weight, module.bias).float()
    if not is_finite(expected):  # calibration names what overflows
        return True
    return bool((y.float() - expected).norm() <= SAME * expected.norm())


class _Choices(TorchDispatchMode):
    """Finds the linear layers whose outputs, alone or after ops on each element, choose positions.

    Args:
        watched: linear layers by name.

    Attributes:
        found: names.
    """

    def __init__(self, watched: Mapping[str, _Watched]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._watched = watched
        # Tensors by id; they are kept, so that an id stays theirs.
        self._names: dict[int, tuple[str, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for name, one in self._watched.items():
            if one.output is not None:
                self._names[id(one.output)] = name, one.output
                one.output = None
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for name in {self._names[id(leaf)][0] for leaf in inputs if id(leaf) in self._names}:
            if func.overloadpacket.__name__ in CHOOSING:
                self.found.add(name)
            width = self._watched[name].module.out_features
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == width:
                    self._names[id(leaf)] = name, leaf
        return result


def _without_gradient(modules: Mapping[str, nn.Module], run: Any, hidden: torch.Tensor) -> Iterable[str]:
    """The names of modules whose outputs the layer's output does not depend on smoothly.

    Args:
        modules: by name.
        run: hidden states -> the layer's output.
        hidden: [..., hidden].
    """
    reached: set[str] = set()

    def mark(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _gradient: reached.add(name))

        return hook

    handles = [module.register_forward_hook(mark(name)) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            output = run(hidden.detach().requires_grad_().clone())
            if output.requires_grad:
                output.float().sum().backward()
    except (NotImplementedError, RuntimeError):  # no gradients at all: forward passes alone can still measure
        return ()
    finally:
        for handle in handles:
            handle.remove()
    # A layer whose code runs without gradients says nothing.
    return modules.keys() - reached if reached else ()
