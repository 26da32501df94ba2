"""The stored weights of a model: the file of each tensor, and its data under the model's own names."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from pgsvd_vllm.errors import CheckpointError, InputError, reason_of
from pgsvd_vllm.format.dtypes import is_finite
from pgsvd_vllm.format.reader import TensorInfo, read_headers, read_index
from pgsvd_vllm.hf.transformers_compat import loaded_dtype, tied_weights
from pgsvd_vllm.hf.weight_mapping import StoredTensor, stored_tensors
from pgsvd_vllm.offline.model.model_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    missing_weights,
    refuse_pointer,
    with_download_advice,
)
from pgsvd_vllm.offline.model.tensor_names import NamedTensors


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The headers of a model folder's safetensors files.

    Raises:
        InputError: the folder has no safetensors files, pointers in their place, or two sets of them.
        CheckpointError: a file is missing or damaged.
    """
    for path in folder.glob("model*.safetensors*"):
        if path.is_file():
            refuse_pointer(path)
    single = folder / SINGLE_FILE
    try:
        if (folder / INDEX_FILE).is_file():
            tensors = read_index(folder, INDEX_FILE)
        elif single.is_file():
            return read_headers(single)
        else:
            raise missing_weights(folder)
    except CheckpointError as error:
        raise with_download_advice(error, folder) from None
    if single.is_file() and all(info.file != single for info in tensors.values()):
        raise InputError(
            f"{folder}: has both {SINGLE_FILE} and {INDEX_FILE} with other files, which may be of two models; "
            "delete one of them"
        )
    return tensors


def fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite tensor stays finite in another floating-point dtype."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).to(dtype).isfinite().all())


class StoredWeights:
    """Reads tensors of a model, under its own names, from a checkpoint that may rename, stack or transpose them.

    Args:
        folder: of the model.
        named: the checkpoint's tensors.
        model: the skeleton, on the meta device.
        transposed: names in the model of weights that the checkpoint stores transposed (GPT-2).

    Attributes:
        tensors: name -> header, as of `NamedTensors`.
        stored: tensor of the model -> how it is stored.
    """

    def __init__(self, folder: Path, named: NamedTensors, model: PreTrainedModel, transposed: set[str]) -> None:
        self.folder, self.model, self.transposed = folder, model, transposed
        self.tensors, self._named = named.headers, named
        self.stored = stored_tensors(model, list(self.tensors))

    @property
    def unused(self) -> list[str]:
        """The tensors that the model does not use, such as layers of multi-token prediction."""
        own = self.model.state_dict().keys()
        used = {name for target, stored in self.stored.items() if target in own for name in stored.names}
        return [name for name in self.tensors if name not in used]

    def check_headers(self) -> None:
        """Check by the headers that every parameter of the model is stored with its shape.

        Raises:
            InputError: a tensor is missing or has another shape; names it.
        """
        tied = tied_weights(self.model)
        for name, parameter in self.model.named_parameters():
            if name in tied:
                continue
            if self._stored(name).converter is None:
                self.check_shape(name, parameter.shape)
                continue
            with suppress(NotImplementedError):  # a conversion that needs the data
                self._with_shape(self._made(name, self._empty), name, parameter.shape)

    def _empty(self, name: str) -> torch.Tensor:
        """A tensor of the shape that a header has, without data."""
        return torch.empty(self.tensors[name].shape, device="meta")

    @property
    def numel(self) -> int:
        """Parameters of the whole model as stored."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def header(self, name: str) -> TensorInfo:
        """The header of a tensor of the model; raises InputError if it is missing."""
        return self.tensors[self._stored(name).names[0]]

    def _stored(self, name: str) -> StoredTensor:
        stored = self.stored.get(name)
        if stored is None:
            raise InputError(f"{self.folder}: tensor {name} that the architecture needs is missing")
        return stored

    def stored_as(self, name: str) -> tuple[str, ...]:
        """The names of the checkpoint's tensors that form a tensor of the model; raises InputError if it is missing."""
        return self._stored(name).names

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the model on the CPU, in its stored dtype, checked to be finite.

        Raises:
            InputError: it is missing, or holds NaN or infinity; names the tensor and the file.
        """
        return self._made(name, self.read)

    def _made(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the model from those that `read` returns; raises InputError if they do not fit together."""
        stored = self._stored(name)
        try:
            loaded = stored.load(name, read, self.model)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError | NotImplementedError):
                raise
            raise InputError(
                f"{self.folder}: tensor {name} cannot be made from {', '.join(stored.names[:2])}, ...: {error}"
            ) from None
        return loaded.T.contiguous() if name in self.transposed else loaded

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint as stored, on the CPU, checked to be finite.

        Raises:
            InputError: it holds NaN or infinity; names the tensor and the file.
        """
        file = self.tensors[name].file
        (tensor,) = (tensor for _, tensor in read_tensors(file, [self._named.in_file[name]]))
        if not is_finite(tensor):
            raise InputError(f"{file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def check_values(self, dtype: torch.dtype) -> None:
        """Read all tensors once, at about the speed of the disk, before a run spends hours on them.

        Args:
            dtype: to serve.

        Raises:
            InputError: a tensor holds NaN or infinity, is too large for `dtype`, or differs from the tensor to which
                config.json ties it; names the tensor and the file.
        """
        unused = set(self.unused)
        names = {original: name for name, original in self._named.in_file.items()}
        for path, group in groupby(sorted(self.tensors, key=lambda n: self.tensors[n].file), self._file):
            for original, tensor in read_tensors(path, [self._named.in_file[name] for name in group]):
                name = names[original]
                if not is_finite(tensor):
                    raise InputError(f"{path}: tensor {original} holds NaN or infinity; the checkpoint is damaged")
                kept = loaded_dtype(self.model, name, dtype)
                if tensor.is_floating_point() and name not in unused and not fits(tensor, kept):
                    raise InputError(
                        f"{path}: tensor {original} holds {tensor.abs().max().item():.3g}, "
                        f"{str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:.3g}; choose `dtype` "
                        "bfloat16"
                    )
        for original, (info, first) in self._named.duplicates.items():
            ((_, tensor),) = read_tensors(info.file, [original])
            if not torch.equal(tensor, self.read(first).to(tensor.dtype)):
                raise InputError(
                    f"{info.file}: tensor {original} differs from {first}, to which config.json ties it; delete the "
                    "wrong one, or set tie_word_embeddings to false"
                )

    def _file(self, name: str) -> Path:
        return self.tensors[name].file

    def shaped(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor of the model, which must have the given shape.

        Raises:
            InputError: as of `tensor`, or the tensor has another shape.
        """
        if self._stored(name).converter is None:
            self.check_shape(name, shape)
        return self._with_shape(self.tensor(name), name, shape)

    def _with_shape(self, tensor: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
        if tensor.shape != shape:
            raise InputError(
                f"{self.folder}: tensor {name} becomes {tuple(tensor.shape)}, the architecture needs {tuple(shape)}"
            )
        return tensor

    def check_shape(self, name: str, shape: torch.Size) -> None:
        """Check a tensor's shape by its header alone; raises InputError if it differs."""
        found = self.header(name).shape
        if (found[::-1] if name in self.transposed else found) != tuple(shape):
            raise InputError(f"{self.folder}: tensor {name} has shape {found}, the architecture needs {tuple(shape)}")


def read_tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and data of some tensors of a safetensors file; raises InputError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)})") from None
