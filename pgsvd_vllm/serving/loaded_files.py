"""Checks the files of a checkpoint that vLLM's own loaders have read, such as those of the load format `auto`."""

import logging
from typing import Any

from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pgsvd_vllm.format.reader import check_every_file
from pgsvd_vllm.format.schema import QUANT_METHOD, FactoredModule
from pgsvd_vllm.serving.vllm_compat.weight_files import local_folder

logger = logging.getLogger("vllm.pgsvd")

# The load format that checks for itself, and the one that reads no file.
_NOT_CHECKED = (QUANT_METHOD, "dummy")


class LoadedFiles:
    """The files of a checkpoint, checked once after vLLM has loaded them.

    vLLM's own loaders do not miss a tensor of a quantized model: its parameter would be uninitialised memory. Only the
    hook that a layer's method has after loading comes late enough for the files of a hub id to be there.

    Args:
        section: the `quantization_config` of config.json.
        modules: its module table.

    Attributes:
        model: folder or hub id; None until vLLM has told it.
        revision: of a hub id.
    """

    def __init__(self, section: dict[str, Any], modules: dict[str, FactoredModule]) -> None:
        self.section, self.modules = section, modules
        self.model: str | None = None
        self.revision: str | None = None
        self._checked = False

    def check_before(self, method: QuantizeMethodBase) -> None:
        """Let a layer's method, before its weights are loaded, check the files before it processes the weights."""
        if self.model is None:
            return
        config = get_current_vllm_config().load_config
        if config.load_format in _NOT_CHECKED:
            return
        process = method.process_weights_after_loading

        def checked(layer: Any) -> None:
            self.check(config)
            process(layer)

        setattr(method, "process_weights_after_loading", checked)  # noqa: B010  (mypy)

    def check(self, config: LoadConfig) -> None:
        """Check the files, the first time; raises CheckpointError if they are not one complete checkpoint."""
        if self._checked or self.model is None:
            return
        self._checked = True
        folder = local_folder(self.model, self.revision, config)
        if folder is None:
            logger.warning(
                "The files of %s are not on this machine and were not checked; --load-format %s checks them",
                self.model,
                QUANT_METHOD,
            )
        else:
            check_every_file(folder, self.section, self.modules)
