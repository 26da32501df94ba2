"""Shared by the tests of serving."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as vLLM's workers set it up."""
    vllm_config = pytest.importorskip("vllm.config", reason="vLLM is not installed")
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        stack.enter_context(vllm_config.set_current_vllm_config(vllm_config.VllmConfig()))
        current_platform.import_kernels()
        store = tmp_path_factory.mktemp("world") / "store"
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{store}", backend="gloo"
        )
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.cleanup_dist_env_and_memory()
