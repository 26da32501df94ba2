"""The checkpoint format, versions 1 and 2: names, shapes and the module table.

A checkpoint is a Hugging Face model folder in which some projections P carry, in place of
`P.weight` [out, in], a low-rank matrix in one of two forms:
  factors  `P.weight_v` [rank, in] and `P.weight_u` [out, rank], with weight = weight_u @ weight_v
  pivot    `P.weight_p` [rank, in], `P.weight_c` [out - rank, rank] and `P.pivots` int32 [rank]: rows `pivots` of the
           weight are weight_p, the other rows are weight_c @ weight_p. It takes rank^2 - rank fewer elements than
           `factors` for the same matrix (PIFA, arXiv 2501.19090).
`config.json` lists them under `quantization_config.modules`. In version 2 each of these matrices, and the weight of a
projection that stays dense (the form `dense`), may be quantized: see `format.quantization`.

The weight files are named `pgsvd-*.safetensors`, not `model-*.safetensors`: a library that does not know the format
finds no weights and stops. Otherwise it would initialize the missing `P.weight` at random.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import Kind, module_kind
from pgsvd_vllm.format.quantization import PACKED, SCALE, Scheme, parse_scheme

# The version of a checkpoint without quantized matrices, and of one with any.
FORMAT_VERSION, QUANTIZED_VERSION = 1, 2
QUANT_METHOD = "pgsvd"
WEIGHTS_STEM = "pgsvd"
INDEX_NAME = f"{WEIGHTS_STEM}.safetensors.index.json"
# The index that vLLM and transformers follow in the folder of a dense model.
DENSE_INDEX_NAME = "model.safetensors.index.json"
# config.json names this file, which does not exist, as the weight file: transformers without pgsvd_vllm.hf stops there,
# and the name says what to import. pgsvd_vllm.hf replaces it by INDEX_NAME.
LOAD_GUARD = "needs-import-pgsvd_vllm.hf.safetensors"
REPORT_NAME = "pgsvd_report.json"
# Form -> suffixes of its tensors; the first is the down factor [rank, in].
FORMS = {"factors": ("weight_v", "weight_u"), "pivot": ("weight_p", "weight_c", "pivots")}
# The form of a quantized weight that is not factored.
DENSE = "dense"
_MATRICES = {**{form: suffixes[:2] for form, suffixes in FORMS.items()}, DENSE: ("weight",)}
FACTOR_SUFFIXES = tuple(suffix for suffixes in FORMS.values() for suffix in suffixes)
QUANTIZED_SUFFIXES = tuple(
    f"{suffix}{ending}" for suffixes in _MATRICES.values() for suffix in suffixes for ending in (PACKED, SCALE)
)
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredModule:
    """One row of the module table: how projection P is stored.

    Attributes:
        rank: of its weight; 0 for the form `dense`.
        form: a key of FORMS, or `dense`.
        kind: `linear`, `expert` (of an MoE expert) or `lm_head`; follows from its name.
        schemes: suffix -> scheme of its quantized matrices.
    """

    rank: int
    form: str = "factors"
    kind: Kind = "linear"
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether it is not factored."""
        return self.form == DENSE

    @property
    def matrices(self) -> tuple[str, ...]:
        """The suffixes of its matrices, the down factor first."""
        return _MATRICES[self.form]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of its stored tensors."""
        found: list[str] = []
        for suffix in FORMS.get(self.form, self.matrices):
            found += [f"{suffix}{end}" for end in (PACKED, SCALE)] if suffix in self.schemes else [suffix]
        return tuple(found)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of its matrices and pivots, as if nothing was quantized, for a dense weight [out, in]."""
        if self.is_dense:
            return {"weight": (out_features, in_features)}
        return form_shapes(self.form, out_features, in_features, self.rank)

    def stored_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of its stored tensors, for a dense weight [out, in]."""
        found: dict[str, tuple[int, ...]] = {}
        for suffix, shape in self.shapes(out_features, in_features).items():
            scheme = self.schemes.get(suffix)
            if scheme is None:
                found[suffix] = shape
            else:
                found |= {f"{suffix}{end}": stored for end, stored in scheme.shapes(*shape).items()}
        return found

    def nbytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """Bytes of its stored tensors.

        Args:
            out_features, in_features: shape of the dense weight.
            itemsize: bytes of an element of matrices that are not quantized.
        """
        total = 0
        for suffix, shape in self.shapes(out_features, in_features).items():
            if suffix in self.schemes:
                total += self.schemes[suffix].nbytes(*shape)
            else:
                total += math.prod(shape) * (4 if suffix == "pivots" else itemsize)
        return total


def row_of(module: FactoredModule) -> dict[str, Any]:
    """A module's row of the table of config.json."""
    row: dict[str, Any] = {"form": module.form} if module.is_dense else {"rank": module.rank, "form": module.form}
    schemes = {suffix: scheme.key for suffix, scheme in module.schemes.items()}
    return {**row, "schemes": schemes} if schemes else row


def form_shapes(form: str, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Tensor suffix -> shape, for a dense weight [out, in] stored in a form with a rank."""
    if form == "factors":
        return {"weight_v": (rank, in_features), "weight_u": (out_features, rank)}
    return {"weight_p": (rank, in_features), "weight_c": (out_features - rank, rank), "pivots": (rank,)}


def stored_size(form: str, out_features: int, in_features: int, rank: int) -> int:
    """Elements stored for a dense weight [out, in] in a form with a rank, pivots included."""
    return sum(math.prod(shape) for shape in form_shapes(form, out_features, in_features, rank).values())


def check_pivots(pivots: torch.Tensor, out_features: int, name: str) -> None:
    """Check that pivots are ascending row numbers.

    Args:
        pivots: int [rank].
        out_features: rows of the dense weight.
        name: of the tensor, for errors.

    Raises:
        CheckpointError: they are not.
    """
    rows = pivots.long()
    if (rows < 0).any() or (rows >= out_features).any() or (rows.diff() <= 0).any():
        raise CheckpointError(f"tensor {name}: not ascending row numbers from 0 to {out_features - 1}")


def parse_modules(section: Mapping[str, Any], where: str) -> dict[str, FactoredModule]:
    """Validate `quantization_config` and return its module table: module name -> row.

    Args:
        section: the `quantization_config` of a config.json.
        where: file to name in errors.

    Raises:
        CheckpointError: wrong method, unknown version or form, a malformed table, or a `head` that is not in it.
    """
    method = section.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quantization method is {method!r}, not {QUANT_METHOD!r}")
    version = section.get("version")
    if version not in (FORMAT_VERSION, QUANTIZED_VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{where}: checkpoint format version {version!r} is not readable here (known: versions {FORMAT_VERSION} "
            f"and {QUANTIZED_VERSION}); it was written by pgsvd-vllm {section.get('tool_version', 'unknown')}: "
            "install that version or a later one"
        )
    schemes = _parse_schemes(section, where) if version == QUANTIZED_VERSION else {}
    table = section.get("modules")
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{where}: quantization_config.modules is missing or not a table")
    head = section.get("head")
    if head is not None and not isinstance(head, str):
        raise CheckpointError(f"{where}: head is {head!r}, not the name of a module")
    modules: dict[str, FactoredModule] = {}
    for name, row in table.items():
        rank = row.get("rank") if isinstance(row, Mapping) else None
        form = row.get("form") if isinstance(row, Mapping) else None
        if not isinstance(form, str) or form not in (*FORMS, *([DENSE] if schemes else [])):
            raise CheckpointError(f"{where}: module {name!r} has form {form!r}; known forms: {', '.join(FORMS)}")
        if form != DENSE and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise CheckpointError(f"{where}: module {name!r} has rank {rank!r}, not a positive integer")
        own = _schemes_of(row, name, _MATRICES[form], schemes, where)
        kind = module_kind(name, head)
        if own and kind != "linear":
            raise CheckpointError(f"{where}: module {name!r} is quantized, but MoE experts and LM heads cannot be")
        modules[name] = FactoredModule(0 if form == DENSE else rank or 0, form, kind, own)
    if head is not None and (head not in modules or modules[head].form != "factors"):
        raise CheckpointError(f"{where}: head is {head!r}, not a module of the table with the form factors")
    return modules


def _parse_schemes(section: Mapping[str, Any], where: str) -> dict[str, Scheme]:
    """The schemes of a section by the names that its module table uses."""
    table = section.get("schemes")
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{where}: quantization_config.schemes is missing or not a table")
    return {name: parse_scheme(value, f"{where}: scheme {name!r}") for name, value in table.items()}


def _schemes_of(
    row: Mapping[str, Any], name: str, matrices: Sequence[str], schemes: Mapping[str, Scheme], where: str
) -> dict[str, Scheme]:
    """The schemes of a module's matrices."""
    own = row.get("schemes", {}) if schemes else {}
    if not isinstance(own, Mapping) or (row["form"] == DENSE and not own):
        raise CheckpointError(f"{where}: module {name!r} has schemes {own!r}, not a table of its matrices")
    for suffix, scheme in own.items():
        if suffix not in matrices or not isinstance(scheme, str) or scheme not in schemes:
            raise CheckpointError(
                f"{where}: module {name!r} has scheme {scheme!r} for {suffix!r}; its matrices are "
                f"{', '.join(matrices)}, the schemes {', '.join(schemes)}"
            )
    return {suffix: schemes[scheme] for suffix, scheme in own.items()}
