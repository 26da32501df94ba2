"""The weight files that vLLM's loaders read: those of the format's index, or every safetensors file."""

from pathlib import Path
from typing import Any

import huggingface_hub
from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import (
    download_safetensors_index_file_from_hf,  # internal: vLLM fetches the index of dense models alone
)

from pgsvd_vllm.format.reader import index_files, read_json
from pgsvd_vllm.format.schema import INDEX_NAME


class IndexedLoader(DefaultModelLoader):
    """vLLM's loader, which reads the files of the format's index instead of every safetensors file of the folder."""

    def _prepare_weights(
        self,
        model_name_or_path: str,
        subfolder: str | None,
        revision: str | None,
        fall_back_to_pt: bool,
        allow_patterns_overrides: list[str] | None,
    ) -> tuple[str, list[str], bool, str]:
        """vLLM's choice of files, which no public method can change; raises CheckpointError for a malformed index."""
        found: Any = super()._prepare_weights(
            model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides
        )
        folder, files, is_safetensors, dense_index = found
        index = Path(folder) / INDEX_NAME
        if not index.is_file() and not Path(model_name_or_path).is_dir():
            download_safetensors_index_file_from_hf(
                model_name_or_path, INDEX_NAME, self.load_config.download_dir, subfolder, revision
            )
        if index.is_file():
            files = [str(index.parent / name) for name in index_files(read_json(index), index)]
        return folder, files, is_safetensors, dense_index

    def weight_files(self, config: ModelConfig) -> list[Path]:
        """The safetensors files of a model, downloaded if needed; vLLM's loader has no public way to list them."""
        _, files, _, _ = self._prepare_weights(config.model, None, config.revision, False, None)
        return [Path(file) for file in files]


def local_folder(model: str, revision: str | None, config: LoadConfig) -> Path | None:
    """The folder of a model's files on this machine; None if there is none.

    Args:
        model: a folder or a hub id.
        revision: of the hub id.
        config: names the hub cache.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, cache_dir=config.download_dir, local_files_only=True
            )
        )
    except (OSError, ValueError):  # not in the cache, or no hub id
        return None
