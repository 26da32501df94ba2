"""Makes a checkpoint of this format of one that another tool factored: the same factors under other names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import pgsvd_vllm
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.reader import TensorInfo, check_data, open_checkpoint, read_config
from pgsvd_vllm.format.schema import FLOAT_DTYPES, FORMAT_VERSION, LOAD_GUARD, QUANT_METHOD
from pgsvd_vllm.format.writer import TensorWriter, save_config
from pgsvd_vllm.hf.transformers_compat import tied_weights
from pgsvd_vllm.hf.weight_mapping import stored_tensors
from pgsvd_vllm.offline.convert.base_config import WRAPPED, base_config
from pgsvd_vllm.offline.convert.layouts import TOOLS, Pair, find_pairs
from pgsvd_vllm.offline.convert.new_folder import NEW, new_folder, refuse_existing
from pgsvd_vllm.offline.convert.skeleton import dense_skeleton, linear_shapes
from pgsvd_vllm.offline.model.companions import without_local_code
from pgsvd_vllm.offline.model.hub import public_name
from pgsvd_vllm.offline.model.model_folder import has_weights, read_model_config
from pgsvd_vllm.offline.model.quantized import DENSE_DTYPES, refuse_quantized_config
from pgsvd_vllm.offline.model.weights import find_tensors, read_tensors
from pgsvd_vllm.offline.output.checkpoint import copy_companions

# What KFAC-SVD/LEMS puts before every name.
_WRAPPER = "wrapped_model."
# Tensors that are no parameters of the dense model: tables of positions, and the other names of shared bases.
_DROPPED = re.compile(r"\.rotary_emb\.inv_freq$|_basis\.")
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl")
_TOKENIZER = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Converted:
    """A checkpoint that was made of another tool's.

    Attributes:
        tool: that factored the model.
        projections: number of factored projections.
        nbytes: of all weights.
        removed: share of the parameters of these projections that the factors save; below 0 if they are larger.
        has_tokenizer: whether a tokenizer was copied.
    """

    tool: str
    projections: int
    nbytes: int
    removed: float
    has_tokenizer: bool


def convert(folder: Path, output: Path, base: Path | None = None, base_name: str = "", command: str = "") -> Converted:
    """Write a checkpoint with the factors of another tool's, bit by bit, in the form `factors` or, of PIFA, `pivot`.

    Factors of two dtypes become the wider one. A basis that several layers share is written for each of them.

    Args:
        folder: of the other checkpoint, in safetensors; no code of it runs.
        output: folder to write, complete or not at all; must not exist.
        base: folder of the dense model, whose config.json and tokenizer are taken in place of the other checkpoint's.
        base_name: of the dense model, for the description.
        command: that is run, for the description.

    Raises:
        InputError: the output exists or cannot be written, the folder has no factors of a known tool, or they do not
            fit the dense model; names the tensor.
        CheckpointError: a file of the folder is missing or damaged.
    """
    refuse_existing(output)
    _refuse_pickles(folder)
    # A folder of tensors alone will do where the dense model is given.
    theirs = {} if base is not None and not (folder / "config.json").exists() else read_model_config(folder)
    refuse_quantized_config(theirs, folder)
    origin = folder if base is None else base  # of config.json and tokenizer
    config = without_local_code(base_config(theirs, folder) if base is None else read_config(base))
    refuse_quantized_config(config, origin)
    tensors = _unwrapped(find_tensors(folder), theirs)
    with new_folder(output) as scratch:
        made = scratch / NEW
        save_config(made, config)
        model = dense_skeleton(made, config, origin, trust_remote_code=False)
        try:
            tool, pairs = find_pairs(linear_shapes(model), {n: info for n, (_, info) in tensors.items()}, theirs)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        writing = _Writing(folder, tensors, pairs, TensorWriter(made))
        writing.run(model, config)
        copied = copy_companions(origin, made, trust_remote_code=False)
        head = _head_name(model)
        config["transformers_weights"] = LOAD_GUARD
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "modules": writing.table,
            "head": head if head in pairs else None,
            "tensors": writing.writer.count,
            "method": f"converted from {tool}",
            "base_model": public_name(base_name or str(theirs.get("base_model_id") or folder)),
            "tool_version": pgsvd_vllm.__version__,
            "command": command,
        }
        save_config(made, config)
        nbytes = writing.writer.close()
        check_data(open_checkpoint(made))
    has_tokenizer = any(path.match(pattern) for path in copied for pattern in _TOKENIZER)
    return Converted(tool, len(pairs), nbytes, 1 - writing.factors / writing.dense, has_tokenizer)


def _refuse_pickles(folder: Path) -> None:
    """Refuse weights that only unpickling would read; raises InputError."""
    found = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not found or has_weights(folder):
        return
    if "remapping_weight.pt" in found:
        raise InputError(
            f"{folder}: holds 8-bit codes of Dobi-SVD (remapping_weight.pt), a pickle, which are not converted; start "
            "from its model without remapping"
        )
    raise InputError(
        f"{folder}: holds {found[0]}, a pickle, which could run any code and is not read. Where you trust it, load it "
        "with the tool that wrote it and save the tensors: safetensors.torch.save_file({name: "
        "tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, 'model.safetensors'), beside "
        "the base model's config.json and tokenizer"
    )


def _unwrapped(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, tuple[str, TensorInfo]]:
    """Name without the tool's prefix -> name in the file and header."""
    prefix = _WRAPPER if config.get("model_type") == WRAPPED else ""
    return {name.removeprefix(prefix): (name, info) for name, info in tensors.items()}


def _head_name(model: PreTrainedModel) -> str:
    """The name of the LM head."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


class _Writing:
    """Writes the tensors of one checkpoint.

    Args:
        folder: of the other checkpoint, for errors.
        tensors: name -> name in the file and header.
        pairs: projection -> its factors.
        writer: of the new checkpoint.

    Attributes:
        table: the module table.
        factors: parameters of the factored projections.
        dense: parameters of their dense weights.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, TensorInfo]],
        pairs: Mapping[str, Pair],
        writer: TensorWriter,
    ) -> None:
        self.folder, self.tensors, self.pairs, self.writer = folder, tensors, pairs, writer
        self.table: dict[str, dict[str, Any]] = {}
        self.factors = self.dense = 0

    def run(self, model: PreTrainedModel, config: dict[str, Any]) -> None:
        """Write the factors and all other tensors of the dense model.

        Args:
            model: the dense model on the meta device.
            config: of the dense model; `tie_word_embeddings` is set to false if the LM head is factored.

        Raises:
            InputError: a tensor is missing, superfluous, not finite or of a wrong shape; names it.
        """
        tied, head = dict(tied_weights(model)), _head_name(model)
        if head in self.pairs and f"{head}.weight" in tied:
            config["tie_word_embeddings"] = False
            del tied[f"{head}.weight"]
        # What the checkpoint would hold if nothing was factored: name -> the tensor that it is read from.
        parts = {one for pair in self.pairs.values() for one in (pair.v, pair.u, pair.pivots, pair.others) if one}
        biases = {pair.bias: f"{name}.bias" for name, pair in self.pairs.items() if pair.bias}
        plain = {biases.get(name, name): name for name in self.tensors if name not in parts and not self._is_left(name)}
        weights = {f"{name}.weight": name for name in self.pairs}
        for name in plain.keys() & weights.keys():
            raise InputError(f"{self.tensors[name][1].file}: tensor {name} is stored beside its own factors")
        stored = stored_tensors(model, [*plain, *weights])
        used: set[str] = set()
        for name, parameter in model.state_dict().items():
            if name in tied:
                self._check_tied(name, tied[name], plain)
                used.add(name)
                continue
            if name not in stored:
                raise InputError(f"{self.folder}: tensor {name} of {type(model).__name__} is missing")
            found = stored[name]
            used |= set(found.names)
            source = plain.get(found.names[0])
            if found.converter is None and source is not None and self.tensors[source][1].shape != parameter.shape:
                shapes = self.tensors[source][1].shape, tuple(parameter.shape)
                raise InputError(f"{self.folder}: {source} has shape {shapes[0]}, not {shapes[1]}")
        for name in plain.keys() - used:
            raise InputError(
                f"{self.tensors[plain[name]][1].file}: tensor {plain[name]} belongs neither to {type(model).__name__} "
                f"nor to factors of {', '.join(TOOLS)}"
            )
        for name in tqdm([*plain, *weights], desc="convert", unit="tensor"):
            if name in weights:
                self._write_factors(weights[name], self.pairs[weights[name]])
            elif name not in tied:
                self.writer.add(name, self._read(plain[name]))

    def _is_left(self, name: str) -> bool:
        """Whether a tensor is no parameter: tables of positions, other names of shared bases, what an exporter left."""
        # KFAC-SVD/LEMS leaves a weight of one element beside its factors.
        beside = name.removesuffix(".weight") in self.pairs and self.tensors[name][1].numel == 1
        return beside or _DROPPED.search(name) is not None

    def _read(self, name: str, dtypes: tuple[str, ...] = DENSE_DTYPES) -> torch.Tensor:
        """A tensor of the other checkpoint; raises InputError if it is not finite or not of one of the dtypes."""
        stored, info = self.tensors[name]
        if info.dtype not in dtypes:
            raise InputError(f"{info.file}: tensor {stored} has dtype {info.dtype}, not {' or '.join(dtypes)}")
        ((_, tensor),) = read_tensors(info.file, [stored])
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(f"{info.file}: tensor {stored} holds NaN or infinity")
        return tensor

    def _write_factors(self, name: str, pair: Pair) -> None:
        """Write the factors of one projection, in one dtype."""
        v, u = self._read(pair.v, FLOAT_DTYPES), self._read(pair.u, FLOAT_DTYPES)
        dtype = torch.promote_types(v.dtype, u.dtype)
        v, u = v.to(dtype), u.to(dtype)
        rank, width = v.shape
        out = len(u) + (rank if pair.pivots else 0)
        stored = self._pivot_form(pair, v, u, out) if pair.pivots else {"weight_v": v, "weight_u": u}
        for suffix, tensor in stored.items():
            self.writer.add(f"{name}.{suffix}", tensor)
            self.factors += tensor.numel()
        self.dense += out * width
        self.table[name] = {"rank": rank, "form": "pivot" if pair.pivots else "factors"}

    def _pivot_form(self, pair: Pair, p: torch.Tensor, c: torch.Tensor, out: int) -> dict[str, torch.Tensor]:
        """The tensors of the pivot form, with ascending rows."""
        pivots, others = (self._read(one, ("I64", "I32")) for one in (pair.pivots, pair.others))
        if (
            len(pivots) != len(p)
            or len(others) != len(c)
            or not torch.equal(torch.cat([pivots, others]).long().sort().values, torch.arange(out))
        ):
            raise InputError(f"{self.folder}: {pair.pivots} and {pair.others} are not the {out} rows of one weight")
        order = pivots.argsort()
        rows = c[others.argsort()][:, order]
        return {"weight_p": p[order], "weight_c": rows, "pivots": pivots[order].int()}

    def _check_tied(self, name: str, kept: str, plain: Mapping[str, str]) -> None:
        """Refuse a tied tensor that is stored a second time with other values; raises InputError."""
        if name in plain and kept in plain and not torch.equal(self._read(plain[name]), self._read(plain[kept])):
            raise InputError(
                f"{self.folder}: tensor {name} differs from {kept}, to which config.json ties it; set "
                "tie_word_embeddings to false, or delete the wrong one"
            )
