"""Run a function of tensors as one CUDA graph: per call the host issues a copy for each argument, and one launch.

The graph holds the whole step. torch.compile(mode="reduce-overhead") would capture only the model, leave out loss,
clipping, optimizer and moving average, and skip graphs whose buffers change in place, as BatchNorm's do (pytorch
#139207).
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Body = Callable[..., None]

WARM_UP_CALLS = 3  # compile, select algorithms, and run once with everything selected
DDP_WARM_UP_CALLS = 11  # DDP times its first ten passes with events, which cannot be captured


class Captured:
    """Captures `body` at the first call; each call copies its arguments into fixed tensors and replays the graph.

    A call with arguments of other shapes captures again. Only the newest graph is kept, since each owns memory for a
    whole step; so shapes should change rarely, as the image size does in progressive resizing.

    `body` may read only constants from the host and must not wait for the device. A replay draws the same random
    numbers as a direct call: it uses the seed and offset that the device's generator has at replay, so
    `torch.manual_seed` before each call determines them (pytorch #84967).

    Args:
        body: changes tensors in place and returns nothing.
        state: returns all tensors that `body` changes. They must exist before the first call and keep their addresses.
        record: captures a function without arguments and returns one that replays it; default `cuda_graph`.
        warm_up: direct calls before a capture, which are undone; `DDP_WARM_UP_CALLS` if `body` calls a DDP model.
    """

    def __init__(
        self,
        body: Body,
        state: Callable[[], list[Tensor]],
        record: Callable[[Body], Body] | None = None,
        warm_up: int = WARM_UP_CALLS,
    ) -> None:
        self._body = body
        self._state = state
        self._record = record or cuda_graph
        self._warm_up_calls = warm_up
        self._inputs: list[Tensor] = []
        self._replay: Body | None = None

    def __call__(self, *arguments: Tensor) -> None:
        """Replay the body with arguments of the same dtypes and strides as in the first call."""
        if [argument.shape for argument in arguments] != [static.shape for static in self._inputs]:
            self._replay = None  # frees the memory of the graph for the earlier shapes
            self._inputs = [torch.empty_like(argument) for argument in arguments]
        for static, argument in zip(self._inputs, arguments, strict=True):
            static.copy_(argument, non_blocking=True)
        if self._replay is None:
            self._warm_up()
            self._replay = self._record(lambda: self._body(*self._inputs))
        self._replay()

    def _warm_up(self) -> None:
        with unchanged(self._state), capture_stream(self._inputs[0].device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            for _ in range(self._warm_up_calls):
                self._body(*self._inputs)


def cuda_graph(body: Body) -> Body:
    """Capture a call of `body` without executing it, and return the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # steps of earlier runs are reference cycles that own graph memory; freeing it would abort the capture
    # thread_local: allocations in threads of DALI or a DataLoader do not abort the capture.
    stream = _stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph.replay


@contextmanager
def unchanged(state: Callable[[], list[Tensor]]) -> Iterator[None]:
    """On exit, restore the tensors in place, and the random generators."""
    tensors = state()
    # Detached: a copy with a history would keep autograd's nodes of the weights, which belong to the current stream.
    copies = [tensor.detach().clone() for tensor in tensors]
    with torch.random.fork_rng({t.device.index or 0 for t in tensors if t.is_cuda}):
        yield
    assert [t.data_ptr() for t in state()] == [t.data_ptr() for t in tensors], "the state must keep its addresses"
    with torch.no_grad():
        for tensor, value in zip(tensors, copies, strict=True):
            tensor.copy_(value)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """The stream of all captures on a GPU."""
    return torch.cuda.Stream(index)


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """Work on the stream of captures, which a capture's warm-up needs; the current stream waits for it on exit.

    A DDP model that is to be captured is constructed here: it keeps the nodes that accumulate gradients, and autograd
    runs a node on the stream on which it was made.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device.index or 0)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
