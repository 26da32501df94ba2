"""vLLM's entry point: registers the method and the loader, in the API server, the engine core and every worker."""

import logging

logger = logging.getLogger("vllm.pgsvd")


SUPPORTED_VLLM = ("0.32", "0.33")


def register() -> None:
    """Register the quantization method and the load format `pgsvd` with vLLM.

    May be called any number of times. Never raises: an exception here would keep every model of
    the environment from being served, so a failed import is logged and the method stays unknown.
    """
    try:
        import vllm

        import pgsvd_vllm.serving.model_loader  # noqa: F401  (importing registers)
    except Exception as error:  # vLLM may raise anything from its own import-time checks
        logger.warning("pgsvd_vllm cannot be used with this vLLM: %s: %s", type(error).__name__, error)
        return
    version = getattr(vllm, "__version__", "unknown")
    if not version.startswith(SUPPORTED_VLLM):
        logger.warning("pgsvd_vllm supports vLLM %s, this is %s", " and ".join(SUPPORTED_VLLM), version)
