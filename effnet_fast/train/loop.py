"""The epochs: step, report, save, evaluate."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from effnet_fast import distributed
from effnet_fast.distributed import World


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps it.

    Attributes:
        epoch, batch: the batch that comes next.
        step: optimizer steps done.
        best: highest validation top-1 so far, percent.
        finished: the run has done all its epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    finished: bool = False


@dataclass(frozen=True)
class Every:
    """What a loop does now and then."""

    log_steps: int
    eval_epochs: int  # the last epoch is always due
    save_due: Callable[[int], bool]  # takes the steps done; the end of an epoch is always due
    report: Callable[[], None]
    save: Callable[[], None]
    evaluate: Callable[[], None]


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


def fit(step, loader, watch, progress: Progress, epochs: int, every: Every, stop: Stop) -> None:
    """Train from where `progress` stands until the last epoch or a stop; then the state is saved."""
    for epoch in range(progress.epoch, epochs):
        for images, labels in watch(loader.epoch(epoch, progress.batch)):
            # Learn from one batch.
            step(images, labels, progress.step)
            progress.step += 1
            progress.batch += 1
            # Say how it goes; this is where the host waits for the device.
            if progress.step % every.log_steps == 0:
                every.report()
            # Leave in good order when asked to.
            if stop.asked(progress.step):
                if stop.out_of_time:
                    every.evaluate()
                every.save()
                return
            # Keep what would be lost.
            if every.save_due(progress.step):
                every.save()
        # An epoch is done: evaluate now and then, and keep it.
        if progress.step % every.log_steps:
            every.report()
        progress.epoch, progress.batch = epoch + 1, 0
        progress.finished = progress.epoch == epochs
        if progress.finished or progress.epoch % every.eval_epochs == 0:
            every.evaluate()
        every.save()
