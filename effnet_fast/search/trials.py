"""Who trains what: an Optuna study whose trials are (candidate, seed), shared by any number of workers.

Each trial is enqueued once and claimed by one worker, both under a lock in the search's folder, which all workers must
see (as they must the checkpoints). A worker renews its claim while it trains: in a database by Optuna's heartbeat, with
a journal, which has none, by the time stamp of a lease file. A claim that is no longer renewed, or was given back, is
free: the trial goes on under another worker, from its checkpoint.
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

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

WAITING, RUNNING, COMPLETE, PRUNED, FAIL = "WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"
LARGEST_FACTOR, LARGEST_SEED = 10.0, 2**31  # Optuna asks for ranges, although every value is given
RENEWALS = 4  # in the time of a lease


class Pruned(Exception):
    """The pruner stopped the trial."""


class Lost(Exception):
    """Another worker took the trial up, for this one was not heard of for longer than the lease."""


@dataclass(frozen=True)
class Task:
    """A candidate to be trained with a seed; `run` names the folder of its run."""

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
    """A trial as a table shows it.

    Attributes:
        run: its task's.
        state: WAITING (given back, too), RUNNING, COMPLETE, PRUNED or FAIL.
        epochs: evaluated so far.
        top1: validation accuracy at the last of them, percent.
        seconds: since it began until it ended or now.
        attrs: what was measured (`finish`), or the reason of a failure.
    """

    run: str
    state: str
    epochs: int
    top1: float | None
    seconds: float | None
    attrs: dict[str, Any]


class Trials:
    """The shared study.

    Args:
        folder: of the search.
        storage: `journal`, a file in the folder, or a database URL.
        name: of the study in the storage.
        digest: of the plan; a study of that name with another one is refused.
        pruner: median, hyperband or none.
        epochs: that a trial is trained for.
        lease_seconds: how long a claim holds without renewal.

    Raises:
        ValueError: the storage cannot be opened, or holds a study of another plan.
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
            self.storage = _open_storage(folder, storage, lease_seconds)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: every trial is enqueued
                pruner=_pruner(pruner, epochs),
            )
            if self.study.user_attrs.setdefault("plan", digest) != digest:
                raise ValueError(f"{storage} holds a study {name!r} of another plan: choose another --run_name")
            self.study.set_user_attr("plan", digest)

    def enqueue(self, tasks: Sequence[Task]) -> None:
        """Add the tasks that are not in the study yet."""
        with self.lock:
            known = {trial.user_attrs["run"] for trial in self.study.get_trials(deepcopy=False)}
            for task in tasks:
                if task.run not in known:
                    self.study.enqueue_trial(task.params, user_attrs={"run": task.run, "candidate": task.candidate})

    def claim(self) -> Trial | None:
        """A trial to train: one whose worker is gone, else one that waits; None if there is neither."""
        with self.lock:
            trial = self._next_abandoned() or self._next_waiting()
            if trial is not None:
                self._renew(trial)  # first: a trial without an owner is free
                trial.set_user_attr("owner", self.owner)
        return trial

    def _next_waiting(self) -> Trial | None:
        from optuna.distributions import FloatDistribution, IntDistribution
        from optuna.trial import TrialState

        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a heartbeat outside of Study.optimize is what `held` is for
            return self.study.ask(
                {
                    **dict.fromkeys(("alpha", "beta", "gamma"), FloatDistribution(1, LARGEST_FACTOR)),
                    "seed": IntDistribution(0, LARGEST_SEED),
                }
            )

    def _next_abandoned(self) -> Trial | None:
        import optuna
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("owner") is None or self._expired(trial._trial_id):
                return optuna.trial.Trial(self.study, trial._trial_id)
        return None

    @contextmanager
    def held(self, trial: Trial) -> Iterator[threading.Event]:
        """Renew the claim meanwhile; the event is set once another worker has taken the trial up."""
        done, lost = threading.Event(), threading.Event()

        def renew() -> None:
            try:
                while not done.wait(self.lease_seconds / RENEWALS):
                    if self._frozen(trial).user_attrs.get("owner") != self.owner:
                        return
                    self._renew(trial)
            finally:  # no longer renewed, be it for an error
                if not done.is_set():
                    lost.set()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()

    def report(self, trial: Trial, epoch: int, top1: float) -> None:
        """Tell an accuracy.

        Raises:
            Pruned: the pruner thinks it not worth while to go on; after the last epoch there is nothing to save.
        """
        if epoch not in self._frozen(trial).intermediate_values:
            trial.report(top1, epoch)
        if epoch < self.epochs and trial.should_prune():
            raise Pruned

    def finish(self, trial: Trial, state: str, top1: float | None = None, **attrs: Any) -> None:
        """End a trial as COMPLETE, PRUNED or FAIL; `attrs` are kept with it."""
        from optuna.trial import TrialState

        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        self.study.tell(trial, top1, state=TrialState[state])
        self._lease(trial).unlink(missing_ok=True)

    def release(self, trial: Trial) -> None:
        """Give a claim back, so that the next worker goes on at once."""
        trial.set_user_attr("owner", None)

    def states(self) -> list[State]:
        """All trials, in the order of their numbers."""
        return [_state(trial) for trial in self.study.get_trials(deepcopy=False)]

    # -- leases

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.storage.get_trial(trial._trial_id)

    def _lease(self, trial: Trial) -> Path:
        return self.leases / str(trial.number)

    def _renew(self, trial: Trial) -> None:
        from optuna.storages import RDBStorage

        if isinstance(self.storage, RDBStorage):
            self.storage.record_heartbeat(trial._trial_id)
        else:
            self._lease(trial).touch()

    def _expired(self, trial_id: int) -> bool:
        from optuna.storages import RDBStorage

        if isinstance(self.storage, RDBStorage):
            return trial_id in self.storage._get_stale_trial_ids(self.study._study_id)
        lease = self.leases / str(self.storage.get_trial(trial_id).number)
        return not lease.exists() or self._now() - lease.stat().st_mtime > self.lease_seconds

    def _now(self) -> float:
        """By the clock that stamps the leases, which on a network file system is not this machine's."""
        clock = self.leases / f".{self.owner}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
        return now


def _open_storage(folder: Path, storage: str, lease_seconds: float) -> optuna.storages.BaseStorage:
    import optuna
    from optuna import storages
    from optuna.exceptions import StorageInternalError
    from optuna.storages.journal import JournalFileBackend

    if storage == "journal":
        return storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
            return storages.RDBStorage(
                storage,
                heartbeat_interval=max(1, round(lease_seconds / RENEWALS)),
                grace_period=max(1, round(lease_seconds)),
            )
    except (StorageInternalError, ImportError, ValueError, _database_error()) as error:
        raise ValueError(
            f"--storage {storage}: {' '.join(str(error).split())[:200]}; give `journal` or a database URL such as "
            "sqlite:///search.db or postgresql://host/name (with its driver installed)"
        ) from error


def _database_error() -> type[Exception]:
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def _pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    from optuna import pruners

    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return pruners.MedianPruner() if name == "median" else pruners.NopPruner()


def _state(trial: FrozenTrial) -> State:
    values = trial.intermediate_values
    given_back = trial.state.name == RUNNING and trial.user_attrs.get("owner") is None
    began = trial.datetime_start
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else time.time()
    return State(
        run=trial.user_attrs["run"],
        state=WAITING if given_back else trial.state.name,
        epochs=max(values, default=0),
        top1=trial.value if trial.value is not None else values.get(max(values, default=0)),
        seconds=ended - began.timestamp() if began else None,
        attrs=trial.user_attrs,
    )
