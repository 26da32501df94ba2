"""The checkpoint format, version 1: names, shapes and the module table.

A checkpoint is a Hugging Face model folder in which some projections P carry, in place of
`P.weight` [out, in], a low-rank matrix in one of two forms:
  factors  `P.weight_v` [rank, in] and `P.weight_u` [out, rank], with weight = weight_u @ weight_v
  pivot    `P.weight_p` [rank, in], `P.weight_c` [out - rank, rank] and `P.pivots` int32 [rank]: rows `pivots` of the
           weight are weight_p, the other rows are weight_c @ weight_p. It takes rank^2 - rank fewer elements than
           `factors` for the same matrix (PIFA, arXiv 2501.19090).
`config.json` lists them under `quantization_config.modules`.

The weight files are named `pgsvd-*.safetensors`, not `model-*.safetensors`: a library that does not know the format
finds no weights and stops. Otherwise it would initialize the missing `P.weight` at random.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.families import Kind, module_kind

FORMAT_VERSION = 1
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
FACTOR_SUFFIXES = tuple(suffix for suffixes in FORMS.values() for suffix in suffixes)
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredModule:
    """One row of the module table: how projection P is stored.

    Attributes:
        rank: of its weight.
        form: a key of FORMS.
        kind: `linear`, `expert` (of an MoE expert) or `lm_head`; follows from its name.
    """

    rank: int
    form: str = "factors"
    kind: Kind = "linear"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of its tensors."""
        return FORMS[self.form]

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Tensor suffix -> shape, for a dense weight [out, in]."""
        return form_shapes(self.form, out_features, in_features, self.rank)


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
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{where}: checkpoint format version {version!r} is not readable here (this is version "
            f"{FORMAT_VERSION}); it was written by pgsvd-vllm {section.get('tool_version', 'unknown')}: "
            "install that version or a later one"
        )
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
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CheckpointError(f"{where}: module {name!r} has rank {rank!r}, not a positive integer")
        if not isinstance(form, str) or form not in FORMS:
            raise CheckpointError(f"{where}: module {name!r} has form {form!r}; known forms: {', '.join(FORMS)}")
        modules[name] = FactoredModule(rank, form, module_kind(name, head))
    if head is not None and (head not in modules or modules[head].form != "factors"):
        raise CheckpointError(f"{where}: head is {head!r}, not a module of the table with the form factors")
    return modules
