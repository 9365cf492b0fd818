"""The training loop: for each epoch, step, report, save, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from effnet_fast.data.loader import Loader
from effnet_fast.train.evaluate import Batches
from effnet_fast.train.stop import Stop


@dataclass
class Progress:
    """Position of a run; saved in its checkpoints.

    Attributes:
        epoch, batch: the next batch to train on, from 0.
        step: optimizer steps done.
        reported: steps of which the reports have told.
        best: highest validation top-1 so far, percent; -1 before the first evaluation.
        finished: all epochs are done.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    reported: int = 0
    best: float = -1.0
    finished: bool = False


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop, and their intervals.

    Attributes:
        log_every_steps: optimizer steps between two reports; the end of an epoch and a stop always report.
        eval_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        save_due: whether to save after this many steps; the end of an epoch always saves.
        report: read the meters and write a row; the host waits for the device.
        save: write a checkpoint.
        evaluate: evaluate the model.
    """

    log_every_steps: int
    eval_every_epochs: int
    save_due: Callable[[int], bool]
    report: Callable[[], None]
    save: Callable[[], None]
    evaluate: Callable[[], None]


def fit(
    step: Callable[[Tensor, Tensor, int], None],
    loader: Loader,
    watch: Callable[[Batches], Batches],
    progress: Progress,
    num_epochs: int,
    hooks: Hooks,
    stop: Stop,
) -> None:
    """Train from `progress` to the last epoch, or until `stop` is requested; either way the state is saved.

    Args:
        step: takes images [N, 3, H, W], labels int64 [N] and the number of the step, from 0.
        loader: yields the training batches.
        watch: wraps the batches to time them.
        progress: updated in place.
        num_epochs: epochs of the whole run.
        hooks: callbacks and their intervals.
        stop: handles signals and the time budget.
    """

    def report() -> None:
        if progress.step > progress.reported:
            hooks.report()
            progress.reported = progress.step

    for epoch in range(progress.epoch, num_epochs):
        for images, labels in watch(loader.epoch(epoch, progress.batch)):
            # Train on one batch.
            step(images, labels, progress.step)
            progress.step += 1
            progress.batch += 1
            # Report.
            if progress.step % hooks.log_every_steps == 0:
                report()
            # Stop on a signal, or when the time is up; in that case evaluate first.
            if stop.requested(progress.step):
                report()
                if stop.out_of_time:
                    hooks.evaluate()
                hooks.save()
                return
            # Save within the epoch.
            if hooks.save_due(progress.step):
                hooks.save()
        # End the epoch: report, evaluate, save.
        report()
        progress.epoch, progress.batch = epoch + 1, 0
        progress.finished = progress.epoch == num_epochs
        if progress.finished or progress.epoch % hooks.eval_every_epochs == 0:
            hooks.evaluate()
        hooks.save()
