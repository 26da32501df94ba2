"""Writes the weight files and the index of a checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pgsvd_vllm.format.checksums import KEY, file_sum
from pgsvd_vllm.format.schema import WEIGHTS_STEM


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask.

    safetensors itself sets 0600, so a server of another user could not read the file.

    Args:
        tensors: name -> contiguous tensor, on any device.
        path: of the file.
        metadata: of the file's header.
    """
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata=metadata)
    give_usual_permissions(path)


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json of a model folder, as `reader.read_config` reads it."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def give_usual_permissions(path: Path) -> None:
    """Let a file's permissions be those that the umask gives a new one."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int, stem: str = WEIGHTS_STEM) -> None:
    """Write the index of a checkpoint's weight files, with their checksums.

    Args:
        folder: of the weight files and the index.
        weight_map: tensor name -> file name.
        total_size: bytes of all tensors.
        stem: begin of the index's name.
    """
    sums = {name: file_sum(folder / name) for name in sorted(set(weight_map.values()))}
    index = {"metadata": {"total_size": total_size, KEY: sums}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class TensorWriter:
    """Writes tensors one by one into safetensors files of bounded size, then the index.

    Args:
        folder: an existing folder.
        max_bytes: of the tensors in one file; a larger tensor gets a file of its own.
        stem: begin of the files' names; that of this format, or `model` for a dense model.

    Attributes:
        numel: elements of all tensors added so far; of packed ones the elements of their matrices.
    """

    def __init__(self, folder: Path, max_bytes: int = 2 * 1024**3, stem: str = WEIGHTS_STEM) -> None:
        self.folder, self.stem = folder, stem
        self.max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0
        self.numel = 0

    def add(self, name: str, tensor: torch.Tensor, elements: int | None = None) -> None:
        """Queue one tensor, and write the queued ones to a file first if they would exceed `max_bytes` together.

        Args:
            name: of the tensor.
            tensor: to write.
            elements: that it counts as, where it is packed or holds scales.
        """
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self.numel += tensor.numel() if elements is None else elements

    @property
    def count(self) -> int:
        """Number of tensors added so far."""
        return sum(len(names) for names in self._files) + len(self._pending)

    def _temporary(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._files.append(list(self._pending))
        save_tensors(self._pending, self._temporary(len(self._files)), metadata={"format": "pt"})
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> int:
        """Write the queued tensors and the index; returns the bytes of all tensors."""
        if self._pending:
            self._flush()
        count = len(self._files)
        weight_map = {}
        for number, names in enumerate(self._files, 1):
            final = f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        write_index(self.folder, weight_map, self._total_bytes, self.stem)
        return self._total_bytes
