"""Tensor-parallel ranks with different thresholds stop with an error, in two real processes."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

VARIABLE = "PGSVD_COLLECTIVE_BYTES"
# The values of two ranks -> the column-parallel (else row-parallel) layer that they make.
CASES = ((("0", "1000000"), False), (("0", "1000000"), True), (("1000000", "1000000"), False))


def make_layers(rank: int, store: Path, answer: Connection) -> None:
    """One rank: make a factored layer for each case as vLLM's model does, and send its cut, or the error."""
    os.environ["VLLM_DIST_IDENT"] = store.parent.name  # names vLLM's shared memory
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    from pgsvd_vllm.errors import InputError
    from pgsvd_vllm.format.schema import FactoredModule
    from pgsvd_vllm.serving.quant_config import PgsvdConfig

    torch.set_num_threads(1)
    found = []
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
        parallel_state.initialize_model_parallel(2)
        for values, column in CASES:
            os.environ[VARIABLE] = values[rank]
            kind = ColumnParallelLinear if column else RowParallelLinear
            try:
                layer = kind(64, 64, False, quant_config=PgsvdConfig({"a": FactoredModule(16)}), prefix="a")
                found.append(layer.quant_method.cut.name)
            except InputError as error:
                found.append(str(error))
        parallel_state.cleanup_dist_env_and_memory()
    answer.send(found)


def test_ranks_with_other_thresholds_stop(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [context.Process(target=make_layers, args=(i, tmp_path / "store", pipes[i][1])) for i in range(2)]
    for rank, (_, sender) in zip(ranks, pipes, strict=True):
        rank.start()
        sender.close()  # a rank that dies ends its pipe
    try:
        for receiver, _ in pipes:
            assert receiver.poll(180), "a rank does not answer"
        answers = [receiver.recv() for receiver, _ in pipes]
    finally:
        for rank in ranks:
            rank.join(30)
            if rank.is_alive():
                rank.kill()
    error = (
        f"{VARIABLE} differs between tensor-parallel ranks: rank 0 has 0, rank 1 has 1000000; "
        "set the same value everywhere"
    )
    assert answers == [[error, error, "ALL_REDUCE_Z"]] * 2
