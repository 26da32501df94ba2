"""Opens the executor that a run asks for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pgsvd_vllm.offline.executor.executor import Executor, LocalExecutor
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.options import RAY, CompressOptions


@contextmanager
def opened(
    options: CompressOptions,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> Iterator[Executor]:
    """The executor of a run, whose processes end with the context.

    Args:
        options: of the run.
        source: the model.
        device: that computes.
        dtype: of weights and activations.
        say: called with one line about the workers, and one for each that is lost.

    Raises:
        InputError: Ray is not installed, or its cluster cannot be reached or has no room for a worker.
    """
    if options.executor != RAY:
        yield LocalExecutor(source, device, dtype)
        return
    # Ray's commands use an access token where there is one, a program that joins their cluster only if told to, and
    # before ray is imported.
    token = Path.home() / ".ray" / "auth_token"
    if options.address is None or token.exists() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from pgsvd_vllm.offline.executor.ray_executor import RayExecutor

    executor = RayExecutor(source, device, dtype, options.address, say)
    try:
        yield executor
    finally:
        executor.close()
