"""The verb tune: time every launch that the kernels of a model's training step may use on this GPU.

Then the ops on their fastest launches are timed beside PyTorch's operators.
"""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import TuneConfig
from effnet_fast.internals import internal
from effnet_fast.model import create_model
from effnet_fast.model.blocks import chosen, launches_used, tuning, use_launches
from effnet_fast.model.launch_layers import launch_layers
from effnet_fast.precision import activation_type, resolve_precision
from effnet_fast.run.gpu_clock import replayed_ms, rotations
from effnet_fast.run.output import check_writable
from effnet_fast.run.resolve import compile_options, resolve_image_size, set_backends
from effnet_fast.run.tuned import Key, Timing, Timings, winners

NATIVE_SIZE = 32  # pixels of CIFAR's images


@dataclass(frozen=True)
class Question:
    """Which launch of a part is fastest on a layer? For an op: which implementation?"""

    part: str
    layer: tuning.Layer

    @property
    def key(self) -> Key:
        return self.part, tuning.PARTS[self.part].sizes(self.layer)

    @property
    def launches(self) -> list[Any]:
        """The heuristic's launch, then the others of the space."""
        kernel, sizes = self.key
        return tuning.PARTS[kernel].choice.candidates(*sizes)

    def call(self, dtype: torch.dtype, device: torch.device) -> tuning.Call:
        """Allocate inputs and return the call to time."""
        return tuning.PARTS[self.part].make(tuning.Inputs(self.layer, dtype, device))

    def timing(self, launch: Any, ms: float | None) -> Timing:
        return Timing(*self.key, asdict(launch), ms)


# Milliseconds of a launch; None if it fails or its result is wrong.
Clock = Callable[[Question, Any], float | None]


def questions(config: TuneConfig) -> list[Question]:
    """The questions of a model's training step, each once: by part, the largest layer first."""
    pixels = resolve_image_size(config.image_size, config.model, NATIVE_SIZE)
    model = create_model(config.model, image_size=pixels, output_stride=config.output_stride, kernels="torch")
    layers = launch_layers(model, config.batch_size, pixels, products=config.kernels == "triton-block")
    asked = [Question(part, layer) for part in tuning.PARTS for layer in layers if part in tuning.parts_of(layer)]
    return list({question.key: question for question in asked}.values())


def tune(config: TuneConfig) -> int:
    """Run `effnet-fast tune`; returns 128 + the signal that stopped it, else 0. Every time measured is kept at once.

    Raises:
        ValueError: there is no GPU, its memory is full, the model does not exist, or EFFNET_KERNELS is set.
        OSError: the cache cannot be written, or the GPU failed.
    """
    if (kernels := chosen("auto")) != "auto":
        raise ValueError(f"tune compares all kernels, but EFFNET_KERNELS={kernels} chooses some: unset it")
    if config.output is not None:
        check_writable(Path(config.output).parent, "--output")
    device = gpu()
    precision = resolve_precision(str(config.mixed_precision), device)
    asked, timings = questions(config), Timings(device, precision)
    open_questions = unanswered(asked, timings.read())
    try:
        with _terminable(), make_clock(config, open_questions, activation_type(precision), device) as clock:
            try:
                search(open_questions, timings, clock, time.monotonic, config.seconds)
            finally:  # also after a failure, and before compilations that still run have ended
                conclude(config, asked, timings)
    except KeyboardInterrupt as stopped:
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """In this context, SIGTERM raises KeyboardInterrupt, as Ctrl-C does; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def gpu() -> torch.device:
    """The current GPU.

    Raises:
        ValueError: there is none.
    """
    device = distributed.choose_device("auto")
    if device.type != "cuda":
        raise ValueError("tune times kernels on a GPU, and no CUDA GPU is visible: run it on the machine that trains")
    return device


def unanswered(asked: list[Question], known: list[Timing]) -> list[tuple[Question, list[Any]]]:
    """Questions with the launches that have no time yet."""
    done: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for timing in known:
        done[timing.kernel, timing.sizes].append(timing.launch)
    left = [
        (question, [launch for launch in question.launches if asdict(launch) not in done[question.key]])
        for question in asked
    ]
    return [(question, launches) for question, launches in left if launches]


def search(
    open_questions: list[tuple[Question, list[Any]]],
    timings: Timings,
    clock: Clock,
    now: Callable[[], float],
    seconds: float,
) -> None:
    """Time launch after launch until none is left or `seconds` by `now` are over."""
    end = now() + seconds
    for number, (question, launches) in enumerate(open_questions, start=1):
        use_launches(winners(timings.read()))  # an op is timed on its fastest launches
        for launch in launches:
            if now() >= end:
                return
            timings.add(question.timing(launch, clock(question, launch)))
        print(
            f"{number}/{len(open_questions)} {question.part}, {question.layer}: {len(launches)} candidates", flush=True
        )


def conclude(config: TuneConfig, asked: list[Question], timings: Timings) -> None:
    """Print what is known about the questions, and write it to `--output`."""
    keys = {question.key for question in asked}
    known = [timing for timing in timings.read() if (timing.kernel, timing.sizes) in keys]
    won = {key: asdict(launch) for key, launch in winners(known).items()}
    left = sum(len(launches) for _, launches in unanswered(asked, known))
    rows = [asdict(timing) | {"wins": timing.launch == won.get((timing.kernel, timing.sizes))} for timing in known]
    rest = f"; {left} are left: the same command goes on" if left else ""
    print(f"{len(known)} candidates timed, {len(won)} of {len(asked)} choices improved, in {timings.path}{rest}")
    if config.output is not None:
        result = {
            "benchmark": "tune",
            "device": "cuda",
            "provenance": provenance.environment(),
            "settings": asdict(config),
            "rows": rows,
        }
        write_atomically(Path(config.output), (json.dumps(result, indent=1) + "\n").encode())


@contextmanager
def make_clock(
    config: TuneConfig, open_questions: list[tuple[Question, list[Any]]], dtype: torch.dtype, device: torch.device
) -> Iterator[Clock]:
    """A clock on the GPU, while other processes compile the launches ahead of it."""
    set_backends(deterministic=False)
    workers = min(config.workers, provenance.cores())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)
    try:
        # A graph is not captured on the default stream.
        patch = internal("torch._inductor.config.patch")
        with torch.cuda.stream(torch.cuda.Stream(device)), patch(compile_options(device)):
            yield GpuClock(dtype, device, pool, open_questions)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class GpuClock:
    """Times launches whose results agree with the heuristic's launch.

    Args:
        pool: compiles the launches of `open_questions`, in this order.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        pool: Executor,
        open_questions: list[tuple[Question, list[Any]]],
    ) -> None:
        self._dtype, self._device = dtype, device
        self._compiled: dict[tuple[Key, Any], Future[None]] = {
            (question.key, launch): pool.submit(tuning.compile_ahead, question.part, question.layer, launch, dtype)
            for question, launches in open_questions
            for launch in launches
        }
        self._question: Question | None = None

    def __call__(self, question: Question, launch: Any) -> float | None:
        """Median milliseconds; None if the launch fails or its result is wrong.

        Raises:
            ValueError: the GPU's memory is full.
            OSError: the GPU failed in an earlier launch, after which a process cannot use it.
        """
        self._compiled[question.key, launch].exception()  # waits; this process compiles what could not be compiled
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise OSError(f"the GPU failed ({first_line}); the same command goes on after this launch") from error
        try:
            return self._measure(question, launch)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"the memory of {self._device} is full: use a smaller --batch_size") from error
        except RuntimeError:  # it needs too many registers or too much shared memory
            return None

    def _measure(self, question: Question, launch: Any) -> float | None:
        if question != self._question:
            torch.compiler.reset()  # it keeps only a few versions of a function
            self._call = question.call(self._dtype, self._device)
            with launches_used({question.key: question.launches[0]}):
                self._expected = self._call()
            self._question = question
        part, layer = tuning.PARTS[question.part], question.layer
        with launches_used({question.key: launch}):
            if not tuning.relative_error(self._call(), self._expected) <= tuning.tolerance(question.part, self._dtype):
                return None
            values = layer.n * layer.c * (part.passes[0] * layer.size**2 + part.passes[1] * layer.out**2)
            sets = rotations(values * self._dtype.itemsize)
            return statistics.median(replayed_ms([question.call(self._dtype, self._device) for _ in range(sets)]))
