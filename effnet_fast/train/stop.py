"""When to save within an epoch, and when to stop: intervals, signals, time budget. All ranks decide the same."""

from __future__ import annotations

import os
import signal
import threading
import time

from effnet_fast import distributed
from effnet_fast.distributed import World

# Several ranks compare clocks and signals only every this many steps, since a collective waits for the device.
POLL_STEPS = 10


class SaveDue:
    """Whether a checkpoint is due within an epoch.

    Args:
        world: rank, size and device.
        steps: interval in optimizer steps; 0 is off.
        minutes: minutes since the last save that was due here; 0 is off.
    """

    def __init__(self, world: World, steps: int, minutes: float) -> None:
        self.world, self.steps, self.seconds = world, steps, 60 * minutes
        self.poll_steps = POLL_STEPS if world.size > 1 else 1
        self.last_saved = time.monotonic()

    def __call__(self, step: int) -> bool:
        due = self.steps > 0 and step % self.steps == 0
        if self.seconds > 0 and not due and step % self.poll_steps == 0:
            due = distributed.any_rank(time.monotonic() - self.last_saved >= self.seconds, self.world.device)
        if due:
            self.last_saved = time.monotonic()
        return due


class Stop:
    """Whether to stop, and why: a signal, or the time budget.

    A context manager that handles SIGNALS. A terminal that closes sends SIGHUP; it stays ignored under nohup.
    Slurm can send SIGUSR1 before the time limit. A second Ctrl-C raises KeyboardInterrupt, except under
    torchrun, which sends each one twice.

    Args:
        world: rank, size and device.
        seconds: time budget from now; 0 is no limit.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, world: World, seconds: float = 0.0) -> None:
        self.world = world
        self.deadline = time.monotonic() + seconds if seconds > 0 else float("inf")
        self.poll_steps = POLL_STEPS if world.size > 1 else 1
        self.signal = 0
        self.on_other_rank = self.out_of_time = False

    def __enter__(self) -> Stop:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        if threading.current_thread() is not threading.main_thread():  # Python leaves signals to the main thread
            ignored = set(self.SIGNALS)
        self._handlers = {n: signal.signal(n, self._handle) for n in self.SIGNALS if n not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == self.signal == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def status(self) -> int:
        """Exit status: 0, or 128 + the signal. SIGTERM if only another rank got one, so that torchrun restarts all."""
        if self.signal:
            return 128 + self.signal
        return 128 + signal.SIGTERM if self.on_other_rank else 0

    def requested(self, step: int) -> bool:
        """Whether to stop after `step` steps; the same on all ranks."""
        if step % self.poll_steps:
            return False
        late = time.monotonic() > self.deadline
        if not distributed.any_rank(bool(self.signal) or late, self.world.device):
            return False
        self.on_other_rank = distributed.any_rank(bool(self.signal), self.world.device)
        self.out_of_time = not self.on_other_rank
        return True
