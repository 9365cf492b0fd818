"""Stage 2, run: claim and train trials and record their results until none is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from effnet_fast import checkpoint
from effnet_fast.config import TrainConfig
from effnet_fast.outcome import FolderInUse, OnEvaluation, Outcome, metric
from effnet_fast.search.family import Scale
from effnet_fast.search.plan import SearchPlan
from effnet_fast.search.runs import failure_reason, free_memory
from effnet_fast.search.setup import SearchSetup
from effnet_fast.search.trials import COMPLETE, FAIL, PRUNED, RUNNING, Lost, Pruned, Task, Trials

if TYPE_CHECKING:
    from optuna.trial import Trial

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Worker:
    """A worker of a search.

    Attributes:
        setup: settings of the search.
        plan: the candidates.
        trials: the trials that all workers share.
        train: function that trains one run.
        training_seconds: function that returns a run's training time, given its folder.
        say: function that prints a line about the progress.
    """

    setup: SearchSetup
    plan: SearchPlan
    trials: Trials
    train: Callable[[TrainConfig, OnEvaluation], Outcome]
    training_seconds: Callable[[Path], float]
    say: Callable[[str], None]

    def run(self) -> int:
        """Train until every trial has ended; return 0, or 128 + the signal number that stopped it."""
        candidates = self.plan.by_name()
        self.trials.enqueue(self.setup.tasks(self.plan))
        while True:
            trial = self.trials.claim()
            if trial is not None:
                # By the name: a worker that died while Optuna wrote the parameters leaves some of them out.
                name, _, seed = trial.user_attrs["run"].rpartition("-s")
                if status := self._do(trial, self.setup.task(candidates[name], int(seed))):
                    return status
            elif any(state.state == RUNNING for state in self.trials.states()):
                time.sleep(POLL_SECONDS)  # if another worker stops, claim its trial
            else:
                return 0

    def _do(self, trial: Trial, task: Task) -> int:
        """Train a trial, unless its candidate was pruned with the first seed: then its other seeds decide nothing."""
        if self._is_first_seed(task) or not self.trials.is_pruned(task.candidate):
            return self._train_trial(trial, task)
        self._finish(trial, task, PRUNED, "left out, because its candidate was pruned")
        return 0

    def _is_first_seed(self, task: Task) -> bool:
        return task.seed == self.setup.seeds[0]

    def _train_trial(self, trial: Trial, task: Task) -> int:
        """Start or resume a trial and record its result; return 0, or 128 + the signal number that stopped it."""
        self.say(f"{task.run}: started")
        try:
            with self.trials.renewing(trial) as lost:
                outcome = self._train_logged(task, self._observer(trial, task, lost))
                if not outcome.finished:
                    self.trials.release(trial)
                    return outcome.status
                measured = self._measure(task)
            self._finish(trial, task, COMPLETE, f"val top-1 {outcome.top1:.2f} %", outcome.top1, **measured)
            return outcome.status  # a signal during the last evaluation
        except Lost:
            self._say_lost(task)
        except FolderInUse:  # keep the claim until it expires, and meanwhile train other trials
            self.say(f"{task.run}: the worker that had it is still at work")
        except Pruned:
            self._finish(trial, task, PRUNED, "pruned")
        except BaseException as error:
            reason = failure_reason(error)
            if reason is None:
                self.trials.release(trial)
                raise
            self._finish(trial, task, FAIL, f"failed, {reason}", reason=reason)
        finally:
            free_memory()
        return 0

    def _observer(self, trial: Trial, task: Task, lost: Event) -> OnEvaluation:
        def observe(epoch: int, row: dict[str, Any]) -> None:
            top1 = metric(row, "top1")
            self.say(f"{task.run}: epoch {epoch}  val top-1 {top1:.2f} %")
            if lost.is_set():
                raise Lost
            self.trials.report(trial, epoch, top1, prune=self._is_first_seed(task))

        return observe

    def _train_logged(self, task: Task, on_evaluation: OnEvaluation) -> Outcome:
        """Train, and append the console output to the run's log.txt."""
        folder = self._folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        if self.setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with (folder / "log.txt").open("a", buffering=1) as log, contextlib.redirect_stdout(log):
            return self.train(self.setup.trial_config(task), on_evaluation)

    def _finish(self, trial: Trial, task: Task, state: str, text: str, top1: float | None = None, **attrs: Any) -> None:
        try:
            self.trials.finish(trial, state, top1, **attrs)
        except Lost:
            self._say_lost(task)
            return
        if state != FAIL and not self.setup.config.keep_checkpoints:
            folder = self._folder(task)
            for path in (*checkpoint.generations(folder / checkpoint.LAST), folder / checkpoint.BEST):
                path.unlink(missing_ok=True)
        self.say(f"{task.run}: {text}")

    def _say_lost(self, task: Task) -> None:
        self.say(f"{task.run}: claimed by another worker")

    def _measure(self, task: Task) -> dict[str, Any]:
        on_gpu = self.setup.device.type == "cuda"
        return {
            "latency_ms": self.setup.latency_ms(Scale(task.alpha, task.beta, task.gamma)),
            "training_seconds": self.training_seconds(self._folder(task)),
            "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }

    def _folder(self, task: Task) -> Path:
        return self.setup.folder / "trials" / task.run
