"""The stored weights of a model: the file of each tensor, and its data under the model's own names."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.format.reader import TensorInfo, read_headers, read_index
from pgsvd_vllm.hf.weight_mapping import StoredTensor, stored_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The headers of a model folder's safetensors files.

    Raises:
        InputError: the folder has no safetensors files.
        CheckpointError: a file is missing or damaged.
    """
    if (folder / INDEX_FILE).is_file():
        return read_index(folder, INDEX_FILE)
    if (folder / SINGLE_FILE).is_file():
        return read_headers(folder / SINGLE_FILE)
    raise InputError(
        f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}; other weight formats (such as .bin) are not "
        "supported: load the model in transformers and save_pretrained it"
    )


class StoredWeights:
    """Reads tensors of a model, under its own names, from a checkpoint that may rename, stack or transpose them.

    Args:
        folder: of the model.
        tensors: the checkpoint's tensor names -> headers.
        model: the skeleton, on the meta device.
        transposed: names in the model of weights that the checkpoint stores transposed (GPT-2).
    """

    def __init__(
        self, folder: Path, tensors: dict[str, TensorInfo], model: PreTrainedModel, transposed: set[str]
    ) -> None:
        self.folder, self.tensors, self.model, self.transposed = folder, tensors, model, transposed
        self.stored = stored_tensors(model, list(tensors))

    @property
    def numel(self) -> int:
        """Parameters of the whole model as stored."""
        return sum(info.numel for info in self.tensors.values())

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
        stored = self._stored(name)
        try:
            loaded = stored.load(name, self.read, self.model)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
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
        info = self.tensors[name]
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def shaped(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor of the model, which must have the given shape.

        Raises:
            InputError: as of `tensor`, or the tensor has another shape.
        """
        if self._stored(name).converter is None:
            self.check_shape(name, shape)
        tensor = self.tensor(name)
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
