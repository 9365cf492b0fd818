"""Time calls on a GPU, replayed from a CUDA graph over buffers that together exceed the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = Callable[[], object]

REPEATS = 20
CACHE_BYTES = 256 << 20  # several times the L2 cache of an A100 or H100


def rotations(bytes_each: int) -> int:
    """How many copies of buffers of this size together exceed the cache."""
    return max(2, min(16, CACHE_BYTES // max(bytes_each, 1) + 1))


def replayed_ms(functions: list[Call]) -> list[float]:
    """Milliseconds of one call, measured REPEATS times. The functions differ only in their buffers and take turns.

    They run on the current stream, which must not be the default one.
    """
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        # Keep all outputs: a freed one's memory would serve the next call, whose writes would then stay in the cache.
        outputs = [function() for function in functions]
    samples = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(functions))
    del outputs
    return samples
