"""Distribute trials, pairs (candidate, seed) of an Optuna study, over any number of workers.

Each trial is enqueued once and claimed by one worker at a time. A file lock in the search's folder, which all workers
share, guards both. While a worker trains, it renews its claim: a database records Optuna's heartbeat; a journal has no
heartbeat, so the worker touches a lease file. If a claim expires or is released, another worker can claim the trial and
resume it from its checkpoint.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from effnet_fast.credentials import mask_credentials
from effnet_fast.search.storage import RENEWALS, open_storage, stale_trial_ids

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

WAITING, RUNNING, COMPLETE, PRUNED, FAIL = "WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"
MAX_FACTOR, MAX_SEED = 10.0, 2**31  # Optuna requires ranges, although no value is sampled


class Pruned(Exception):
    """The pruner stopped the trial."""


class Lost(Exception):
    """This worker did not renew its claim in time, and another worker claimed the trial."""


@dataclass(frozen=True)
class Task:
    """A candidate to train with one seed; `run` is the name of its run folder."""

    candidate: str
    alpha: float
    beta: float
    gamma: float
    seed: int

    @property
    def run(self) -> str:
        return f"{self.candidate}-s{self.seed}"

    @property
    def params(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "seed": self.seed}


@dataclass(frozen=True)
class State:
    """A snapshot of a trial, for tables and plots.

    Attributes:
        run: name of its run folder.
        state: WAITING (also after a release), RUNNING, COMPLETE, PRUNED or FAIL.
        epochs: number of the last evaluated epoch.
        top1: validation accuracy after that epoch, percent.
        seconds: time from its start to its end, or to now if it has not ended.
        attrs: Optuna's user attributes: run, candidate, owner, and the `attrs` passed to `finish`.
    """

    run: str
    state: str
    epochs: int
    top1: float | None
    seconds: float | None
    attrs: dict[str, Any]


class Trials:
    """The trials of a search, shared by its workers.

    Args:
        folder: the search's folder.
        storage: `journal` for a file in the folder, or a database URL.
        name: name of the Optuna study in the storage.
        digest: hash of the plan.
        pruner: median, hyperband or none.
        epochs: length of a complete trial.
        lease_seconds: a claim expires after this time without renewal.

    Raises:
        ValueError: the storage cannot be opened, or its study of that name belongs to another plan.
    """

    def __init__(
        self, folder: Path, storage: str, name: str, *, digest: str, pruner: str, epochs: int, lease_seconds: float
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.epochs, self.lease_seconds = epochs, lease_seconds
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self.lock = FileLock(folder / ".lock")
        self.leases = folder / "leases"
        with self.lock:
            self.leases.mkdir(exist_ok=True)
            self.storage = open_storage(folder, storage, lease_seconds)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),  # not used, because every trial is enqueued
                pruner=_pruner(pruner, epochs),
            )
            if self.study.user_attrs.setdefault("plan", digest) != digest:
                raise ValueError(
                    f"{mask_credentials(storage)} holds a study {name!r} of another plan: choose another --run_name"
                )
            self.study.set_user_attr("plan", digest)

    def enqueue(self, tasks: Sequence[Task]) -> None:
        """Add the tasks that are not in the study yet."""
        with self.lock:
            known = {trial.user_attrs["run"] for trial in self.study.get_trials(deepcopy=False)}
            for task in tasks:
                if task.run not in known:
                    self.study.enqueue_trial(task.params, user_attrs={"run": task.run, "candidate": task.candidate})

    def claim(self) -> Trial | None:
        """Claim an abandoned trial, else a waiting one; return None if there is neither."""
        with self.lock:
            trial = self._next_abandoned() or self._next_waiting()
            if trial is not None:
                self._renew(trial)  # first, because a trial with an owner but no lease counts as abandoned
                trial.set_user_attr("owner", self.owner)
        return trial

    def _next_waiting(self) -> Trial | None:
        from optuna.distributions import FloatDistribution, IntDistribution
        from optuna.trial import TrialState

        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Optuna expects heartbeats from Study.optimize; `renewing` sends them instead
            return self.study.ask(
                {
                    **dict.fromkeys(("alpha", "beta", "gamma"), FloatDistribution(1, MAX_FACTOR)),
                    "seed": IntDistribution(0, MAX_SEED),
                }
            )

    def _next_abandoned(self) -> Trial | None:
        import optuna
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("owner") is None or self._is_expired(trial):
                return optuna.trial.Trial(self.study, self._id(trial))
        return None

    @contextmanager
    def renewing(self, trial: Trial) -> Iterator[threading.Event]:
        """Renew the claim in a thread; set the event when another worker has claimed the trial or a renewal failed."""
        done, lost = threading.Event(), threading.Event()

        def renew() -> None:
            try:
                while not done.wait(self.lease_seconds / RENEWALS):
                    if self._frozen(trial).user_attrs.get("owner") != self.owner:
                        return
                    self._renew(trial)
            finally:  # also after an error, because then renewal has stopped
                if not done.is_set():
                    lost.set()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()

    def report(self, trial: Trial, epoch: int, top1: float, *, prune: bool = True) -> None:
        """Record the accuracy (percent) after an epoch. If a resumed trial repeats an epoch, the first value stays.

        Raises:
            Pruned: `prune`, and the pruner stops the trial; not after the last epoch, when pruning saves nothing.
        """
        if epoch not in self._frozen(trial).intermediate_values:
            trial.report(top1, epoch)
        if prune and epoch < self.epochs and trial.should_prune():
            raise Pruned

    def finish(self, trial: Trial, state: str, top1: float | None = None, **attrs: Any) -> None:
        """End a trial as COMPLETE, PRUNED or FAIL, and store `attrs` as its user attributes.

        Raises:
            Lost: another worker has claimed the trial, or ended it.
        """
        from optuna.trial import TrialState

        with self.lock:  # a trial that is running without a lease counts as abandoned
            known = self._frozen(trial)
            if known.state.is_finished() or known.user_attrs.get("owner") != self.owner:
                raise Lost
            for name, value in attrs.items():
                trial.set_user_attr(name, value)
            self.study.tell(trial, top1, state=TrialState[state])
            self._lease(trial).unlink(missing_ok=True)

    def release(self, trial: Trial) -> None:
        """Give up a claim, so that another worker need not wait for it to expire; not one that another worker has."""
        with self.lock:
            if self._frozen(trial).user_attrs.get("owner") == self.owner:
                trial.set_user_attr("owner", None)

    def is_pruned(self, candidate: str) -> bool:
        """Whether a trial of this candidate has been pruned."""
        from optuna.trial import TrialState

        pruned = self.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        return any(trial.user_attrs["candidate"] == candidate for trial in pruned)

    def states(self) -> list[State]:
        """All trials, ordered by number."""
        return [_state(trial) for trial in self.study.get_trials(deepcopy=False)]

    # -- leases

    def _id(self, trial: Trial | FrozenTrial) -> int:
        """Return the storage's id of a trial, which Optuna's trial objects do not expose."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.storage.get_trial(self._id(trial))

    def _lease(self, trial: Trial | FrozenTrial) -> Path:
        return self.leases / str(trial.number)

    def _renew(self, trial: Trial) -> None:
        from optuna.storages import RDBStorage

        if isinstance(self.storage, RDBStorage):
            self.storage.record_heartbeat(self._id(trial))
        else:
            self._lease(trial).touch()

    def _is_expired(self, trial: FrozenTrial) -> bool:
        from optuna.storages import RDBStorage

        if isinstance(self.storage, RDBStorage):
            return self._id(trial) in stale_trial_ids(self.storage, self.study.study_name)
        lease = self._lease(trial)
        return not lease.exists() or self._now() - lease.stat().st_mtime > self.lease_seconds

    def _now(self) -> float:
        """Return the time of the clock that stamps the leases; on a network file system, it is the server's clock."""
        probe = self.leases / f".{self.owner}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


def _pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    from optuna import pruners

    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return pruners.MedianPruner() if name == "median" else pruners.NopPruner()


def _state(trial: FrozenTrial) -> State:
    values = trial.intermediate_values
    is_released = trial.state.name == RUNNING and trial.user_attrs.get("owner") is None
    start = trial.datetime_start
    end = trial.datetime_complete.timestamp() if trial.datetime_complete else time.time()
    return State(
        run=trial.user_attrs["run"],
        state=WAITING if is_released else trial.state.name,
        epochs=max(values, default=0),
        top1=trial.value if trial.value is not None else values.get(max(values, default=0)),
        seconds=end - start.timestamp() if start else None,
        attrs=trial.user_attrs,
    )
