"""A function of tensors as one CUDA graph, so that a step costs the host three copies and one launch.

The whole step is captured, rather than each of the compiled model's graphs by torch.compile(mode="reduce-overhead"):
Inductor skips those under DDP, where BatchNorm's buffers are changed in place (pytorch #139207), and the loss, the
clipping, the optimizer and the average would stay outside of them.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Body = Callable[..., None]

WARM_UP_CALLS = 3  # compile, choose algorithms, and once more with everything chosen


class Captured:
    """Captures `body` at the first call, and from then on copies its arguments into place and replays it.

    `body` must read nothing from the host but constants, and must not wait for the device. The random numbers of a
    replay are those of an ordinary call: a graph draws from the seed and offset that the device's generator has when
    it is replayed, not when it was captured, so `torch.manual_seed` before each call decides them (pytorch #84967).

    Args:
        body: changes tensors in place and returns nothing.
        state: gives all tensors that `body` changes; they must exist before and keep their places ever after.
        record: turns a function without arguments into one that replays it; `cuda_graph`, other than in tests.
    """

    def __init__(
        self, body: Body, state: Callable[[], list[Tensor]], record: Callable[[Body], Body] | None = None
    ) -> None:
        self._body = body
        self._state = state
        self._record = record or cuda_graph
        self._inputs: list[Tensor] = []
        self._replay: Body | None = None

    def __call__(self, *arguments: Tensor) -> None:
        """Replay the body with these arguments, which must have the shapes, types and strides of the first call's."""
        if self._replay is None:
            self._inputs = [torch.empty_like(argument) for argument in arguments]
        for place, argument in zip(self._inputs, arguments, strict=True):
            assert place.shape == argument.shape, f"captured for {tuple(place.shape)}, not {tuple(argument.shape)}"
            place.copy_(argument, non_blocking=True)
        if self._replay is None:
            self._warm_up()
            self._replay = self._record(lambda: self._body(*self._inputs))
        self._replay()

    def _warm_up(self) -> None:
        with unchanged(self._state), _side_stream(self._inputs[0].device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            for _ in range(WARM_UP_CALLS):
                self._body(*self._inputs)


def cuda_graph(body: Body) -> Body:
    """Capture a call of `body`, which is not carried out, and return the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # steps of earlier runs are cycles that hold their graphs' memory, which nothing shall free meanwhile
    # The other threads are DALI's or a DataLoader's, whose allocations must not break the capture off.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph.replay


@contextmanager
def unchanged(state: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Whatever happens within leaves the tensors, in their places, and the random generators as they were."""
    tensors = state()
    held = [tensor.clone() for tensor in tensors]
    with torch.random.fork_rng({t.device.index or 0 for t in tensors if t.is_cuda}):
        yield
    assert [t.data_ptr() for t in state()] == [t.data_ptr() for t in tensors], "the state must keep its places"
    with torch.no_grad():
        for tensor, value in zip(tensors, held, strict=True):
            tensor.copy_(value)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Work queued within goes to a stream of its own, as capturing wants of a warm-up; the current one waits for it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
