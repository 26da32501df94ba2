"""Seconds of a GEMM on a GPU, from CUDA graphs over more weights than its caches hold."""

from collections.abc import Callable, Sequence

import torch

# More than the second-level cache of any GPU of today.
COPY_BYTES = 400e6
Call = Callable[[], object]


def seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds of one of the calls, which run one after the other in one CUDA graph.

    Between two calls a small kernel of torch runs, as in a model, so that they do not overlap; its time is subtracted.

    Args:
        calls: best of as many weights as COPY_BYTES hold, each once.
        device: a CUDA device.
    """
    for call in calls[:2]:
        call()
    between = torch.zeros(4096, device=device)
    whole = _replayed([lambda call=call: (call(), between.add_(1)) for call in calls])  # type: ignore[misc]
    return (whole - _replayed([lambda: between.add_(1) for _ in calls])) / len(calls)


def _replayed(calls: list[Call]) -> float:
    """Seconds of all calls in one CUDA graph, at best."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The GPU is busy when the timed replay is launched: the CPU's part of it is not timed.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best
