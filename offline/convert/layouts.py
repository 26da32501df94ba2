"""Finds the factors of a model in a checkpoint of another tool, by the names and shapes of its tensors.

The names of each tool are facts read from its public code: KFAC-SVD/LEMS (github.com/lems-svd/lems), ASVD
(hahnyuan/ASVD4LLM), SVD-LLM (AIoT-MLSys-Lab/SVD-LLM), Basis Sharing (TUDa-HWAI/Basis_Sharing), PIFA
(biomedical-cybernetics/pivoting-factorization), Dobi-SVD (wangqinsi1/Dobi-SVD), Lillama (yaya-sy/lillama) and
Zero-Sum-SVD (mint-vu/Zero-Sum-SVD).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import TensorInfo


@dataclass(frozen=True)
class Pair:
    """The tensors of one factored projection, by their names in the other checkpoint.

    Attributes:
        v: the down factor [rank, in].
        u: the up factor [out, rank], or with `pivots` the coefficients [out - rank, rank] of the other rows.
        bias: [out]; empty if there is none.
        pivots, others: row numbers of the weight that are v, and those that are u v; empty for plain factors.
    """

    v: str
    u: str
    bias: str = ""
    pivots: str = ""
    others: str = ""


@dataclass(frozen=True)
class Layout:
    """How one tool names its tensors; names have {p} for a projection's name, {s} for it without its end `_proj`.

    Attributes:
        tool: that writes it.
        v, u, bias, pivots, others: names of the tensors of `Pair`.
    """

    tool: str
    v: str
    u: str
    bias: str
    pivots: str = ""
    others: str = ""

    def pair(self, name: str, has: Callable[[str], bool]) -> Pair | None:
        """The tensors of a projection; None if it has no factors here.

        Raises:
            InputError: one of its tensors is missing.
        """

        def filled(template: str) -> str:
            return template.format(p=name, s=name.removesuffix("_proj")) if template else ""

        v, u, bias, *rows = map(filled, (self.v, self.u, self.bias, self.pivots, self.others))
        if not has(v) and not has(u):
            return None
        # PIFA leaves some projections as plain factors.
        rows = rows if any(map(has, rows)) else ["", ""]
        for one in (v, u, *rows):
            if one and not has(one):
                raise InputError(f"tensor {one}, a part of {name} ({self.tool}), is missing")
        return Pair(v, u, bias if has(bias) else "", *rows)


AB = ("{p}.ALinear.weight", "{p}.BLinear.weight", "{p}.ALinear.bias")
LAYOUTS = (
    Layout("KFAC-SVD/LEMS", "{p}.mod_a.weight", "{p}.mod_b.weight", "{p}.bias"),
    Layout("ASVD", AB[1], AB[0], AB[2]),
    Layout("Dobi-SVD", AB[0], AB[1], ""),  # its biases are on the wrong factor, or random
    Layout("SVD-LLM", "{s}_v_proj.weight", "{s}_u_proj.weight", "{s}_u_proj.bias"),
    Layout("Zero-Sum-SVD", "{p}.v_proj.weight", "{p}.u_proj.weight", "{p}.u_proj.bias"),
    Layout("Lillama", "{p}.0.weight", "{p}.1.weight", "{p}.1.bias"),
)
PIFA = Layout("PIFA", AB[1], AB[0], "{p}.bias", "{p}.false_idx", "{p}.true_idx")
BASIS_SHARING = "Basis Sharing"
# End of a projection's name -> the name of its basis.
BASES = {
    **dict.fromkeys(("o_proj", "out_proj", "attn.c_proj"), "o"),
    **dict.fromkeys(("up_proj", "fc1", "c_fc"), "up"),
    **dict.fromkeys(("down_proj", "fc2", "mlp.c_proj"), "down"),
    **{"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "gate", "c_attn": "attn"},
}
TOOLS = sorted({*(layout.tool for layout in (*LAYOUTS, PIFA)), BASIS_SHARING})


def find_pairs(
    shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[str, dict[str, Pair]]:
    """The tool that wrote a checkpoint, and the factors of each projection.

    Args:
        shapes: linear layer of the dense model -> (out, in).
        tensors: of the checkpoint: name -> header.
        config: its config.json.

    Returns:
        The tool, and projection -> its tensors, whose shapes fit.

    Raises:
        InputError: no factors are found, one of two is missing, or factors do not fit the model; names the tensor.
    """
    layout = _layout_of(shapes, tensors)
    if layout is not None:
        found = {name: pair for name in shapes if (pair := layout.pair(name, tensors.__contains__)) is not None}
        tool = layout.tool
    else:
        tool, found = BASIS_SHARING, dict(_shared(shapes, tensors, config))
    if not found:
        raise InputError(f"no low-rank factors under the names of {', '.join(TOOLS)} were found")
    for name, pair in found.items():
        _check(name, pair, shapes[name], tensors)
    return tool, found


def _layout_of(shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, TensorInfo]) -> Layout | None:
    """The layout whose names occur; of those that share names, such as ASVD and Dobi-SVD, the one whose shapes fit."""
    has = tensors.__contains__
    if any(has(PIFA.pivots.format(p=name)) for name in shapes):
        return PIFA

    def misfits(layout: Layout) -> int:
        pairs = ((name, layout.pair(name, has)) for name in shapes)
        return sum(pair is not None and not _fits(pair, shapes[name], tensors) for name, pair in pairs)

    present = [layout for layout in LAYOUTS if any(layout.pair(name, has) for name in shapes)]
    return min(present, key=misfits, default=None)


def _fits(pair: Pair, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the factors' shapes give a weight [out, in]."""
    v, u = tensors[pair.v].shape, tensors[pair.u].shape
    out, width = shape
    rows = out - (v[0] if pair.pivots and v else 0)
    return len(v) == 2 and len(u) == 2 and v[1] == width and u == (rows, v[0])


def _check(name: str, pair: Pair, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse factors that do not fit the model; raises InputError."""
    if not _fits(pair, shape, tensors):
        found = " and ".join(f"{one} {tensors[one].shape}" for one in (pair.v, pair.u))
        raise InputError(f"{tensors[pair.v].file}: {found} are no factors of {name} {shape}")


def _shared(
    shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[tuple[str, Pair]]:
    """The factors of Basis Sharing: a basis of several layers, and coefficients under the projection's own name."""
    for name in shapes:
        kind = next((kind for end, kind in BASES.items() if name.endswith(f".{end}")), None)
        stack, _, rest = next((name.partition(part) for part in (".layers.", ".h.") if part in name), ("", "", ""))
        number = rest.partition(".")[0]
        if kind is None or not number.isdecimal():
            continue
        basis = next((one for one in _bases(name, kind, stack, int(number), config) if one in tensors), None)
        bias = f"{name}.bias"
        own = tensors.get(f"{name}.weight")
        if basis is None or own is None:
            continue
        is_dense = own.shape == shapes[name] and tensors[basis].shape[:1] != own.shape[1:]
        if not is_dense:
            yield name, Pair(basis, f"{name}.weight", bias if bias in tensors else "")


def _bases(name: str, kind: str, stack: str, number: int, config: Mapping[str, Any]) -> Iterator[str]:
    """The names under which the basis of a projection of layer `number` may be stored.

    Layers of one group share it, so a file may have it under the name of another layer of the group alone.
    """
    groups = config.get(f"{kind}_groups")
    members: Collection[int] = next((g for g in groups if number in g), ()) if isinstance(groups, list) else ()
    own = name.rpartition(".")[0].replace(f".{number}.", ".{}.", 1)
    for layer in (number, *members):
        yield f"{stack}.{kind}_basis.{layer}.weight"
        yield f"{own.format(layer)}.{kind}_basis.weight"
