"""The checkpoint format, version 1: schema, reading, validation.

A checkpoint is a Hugging Face model folder in which some projections P carry, in place of
`P.weight` [out, in], a low-rank matrix in one of two forms:
  factors  `P.weight_v` [rank, in] and `P.weight_u` [out, rank], with weight = weight_u @ weight_v
  pivot    `P.weight_p` [rank, in], `P.weight_c` [out - rank, rank] and `P.pivots` int32 [rank]: the
           rows of the weight that `pivots` names are weight_p, the others are weight_c @ weight_p.
           The same matrix in rank^2 - rank fewer elements (PIFA, arXiv 2501.19090).
`config.json` lists them under `quantization_config.modules`.

The weight files are named `pgsvd-*.safetensors`, not `model-*.safetensors`: a library that does
not know the format finds no weights and stops; it would otherwise initialize the missing
`P.weight` at random. This module imports neither vLLM nor the compression side.
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
# Named by config.json as the weight file. It does not exist: a transformers that has not imported
# pgsvd_vllm.hf stops there, and the name tells what to do. pgsvd_vllm.hf replaces it by INDEX_NAME.
LOAD_GUARD = "needs-import-pgsvd_vllm.hf.safetensors"
REPORT_NAME = "pgsvd_report.json"
# form -> its tensors; the first is the down factor [rank, in].
FORMS = {"factors": ("weight_v", "weight_u"), "pivot": ("weight_p", "weight_c", "pivots")}
FACTOR_SUFFIXES = tuple(suffix for suffixes in FORMS.values() for suffix in suffixes)
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FactoredModule:
    """One row of the module table: how projection P is stored.

    Attributes:
        rank: of its weight.
        form: a key of FORMS.
        kind: a linear layer's projection, a MoE expert's, or the LM head; follows from its name.
    """

    rank: int
    form: str = "factors"
    kind: Kind = "linear"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return FORMS[self.form]

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors for a weight [out, in]."""
        return form_shapes(self.form, out_features, in_features, self.rank)


def form_shapes(form: str, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Tensor suffix -> shape, of a weight [out, in] stored with a rank in a form."""
    if form == "factors":
        return {"weight_v": (rank, in_features), "weight_u": (out_features, rank)}
    return {"weight_p": (rank, in_features), "weight_c": (out_features - rank, rank), "pivots": (rank,)}


def stored_size(form: str, out_features: int, in_features: int, rank: int) -> int:
    """Elements stored for a weight [out, in] with a rank in a form, pivots included."""
    return sum(math.prod(shape) for shape in form_shapes(form, out_features, in_features, rank).values())


def check_pivots(pivots: torch.Tensor, out_features: int, name: str) -> None:
    """Raise CheckpointError unless `pivots` are ascending rows of a weight with `out_features` rows."""
    rows = pivots.long()
    if (rows < 0).any() or (rows >= out_features).any() or (rows.diff() <= 0).any():
        raise CheckpointError(f"tensor {name}: not ascending row numbers from 0 to {out_features - 1}")


def parse_modules(section: Mapping[str, Any], where: str) -> dict[str, FactoredModule]:
    """Check `quantization_config` and return its module table.

    Args:
        section: the `quantization_config` of a config.json.
        where: what to name in errors, usually the file.

    Raises:
        CheckpointError: wrong method, unknown version or form, or a malformed table.
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
    modules: dict[str, FactoredModule] = {}
    for name, row in table.items():
        rank = row.get("rank") if isinstance(row, Mapping) else None
        form = row.get("form") if isinstance(row, Mapping) else None
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CheckpointError(f"{where}: module {name!r} has rank {rank!r}, not a positive integer")
        if not isinstance(form, str) or form not in FORMS:
            raise CheckpointError(f"{where}: module {name!r} has form {form!r}; known forms: {', '.join(FORMS)}")
        modules[name] = FactoredModule(rank, form, module_kind(name, section.get("head")))
    return modules
