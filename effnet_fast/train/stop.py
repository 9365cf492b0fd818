"""When a run stops and when it saves within an epoch: signals, time budgets, intervals. All ranks agree."""

from __future__ import annotations

import os
import signal
import time

from effnet_fast import distributed
from effnet_fast.distributed import World

# With several ranks, steps between two agreements about what only clocks and signals tell; each waits for the device.
POLL_STEPS = 10


class SaveDue:
    """When a checkpoint is due within an epoch. All ranks agree.

    Args:
        world: of the run.
        steps: every so many; 0 is off.
        minutes: every so many; 0 is off.
    """

    def __init__(self, world: World, steps: int, minutes: float) -> None:
        self.world, self.steps, self.seconds = world, steps, 60 * minutes
        self.poll_steps = POLL_STEPS if world.size > 1 else 1
        self.last = time.monotonic()

    def __call__(self, step: int) -> bool:
        due = self.steps > 0 and step % self.steps == 0
        if self.seconds > 0 and not due and step % self.poll_steps == 0:
            due = distributed.any_rank(time.monotonic() - self.last >= self.seconds, self.world.device)
        if due:
            self.last = time.monotonic()
        return due


class Stop:
    """Why a run should stop: a signal was caught or its time is up. All ranks agree.

    A context manager: signals are caught within; SIGUSR1 is what Slurm can send some time before the end. The second
    Ctrl-C interrupts at once, but not under torchrun, which passes each on once more.

    Args:
        world: of the run.
        seconds: from now; 0 is no limit.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World, seconds: float = 0.0) -> None:
        self.world = world
        self.deadline = time.monotonic() + seconds if seconds > 0 else float("inf")
        self.poll_steps = POLL_STEPS if world.size > 1 else 1
        self.signal = 0
        self.elsewhere = self.out_of_time = False

    def __enter__(self) -> Stop:
        self._handlers = {number: signal.signal(number, self._caught) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: object) -> None:
        if number == self.signal == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def status(self) -> int:
        """Exit status: 0, or 128 + the signal; SIGTERM for another rank's, so that torchrun starts this one again."""
        if self.signal:
            return 128 + self.signal
        return 128 + signal.SIGTERM if self.elsewhere else 0

    def asked(self, step: int) -> bool:
        if step % self.poll_steps:
            return False
        late = time.monotonic() > self.deadline
        if not distributed.any_rank(bool(self.signal) or late, self.world.device):
            return False
        self.elsewhere = distributed.any_rank(bool(self.signal), self.world.device)
        self.out_of_time = not self.elsewhere
        return True
