"""The epochs: step, report, save, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from effnet_fast.train.stop import Stop


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
