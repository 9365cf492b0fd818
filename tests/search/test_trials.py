"""Trials are enqueued once, claimed once, and resumed by others after their worker has gone."""

import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from effnet_fast.search.storage import explain_errors, stale_trial_ids
from effnet_fast.search.trials import Lost, Pruned, Task, Trials

pytest.importorskip("optuna")

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import text

TASKS = [Task(f"c{i}", 1 + i / 10, 1.1, 1.15, seed) for i in range(4) for seed in range(2)]
STORAGES = ["journal", "sqlite:///{folder}/search.db"]


def trials(folder, storage="journal", pruner="none", digest="plan", lease_seconds=60.0):
    storage = storage.format(folder=folder)
    return Trials(folder, storage, "search", digest=digest, pruner=pruner, epochs=9, lease_seconds=lease_seconds)


def claim_all(arguments):
    """A worker: enqueue, then claim until nothing waits; returns the claimed runs."""
    shared = trials(*arguments)
    shared.enqueue(TASKS)
    claimed = []
    while (trial := shared.claim()) is not None:
        claimed.append(trial.user_attrs["run"])
        shared.finish(trial, "COMPLETE", 1.0)
    return claimed


@pytest.mark.parametrize("storage", STORAGES)
def test_two_workers_claim_each_trial_once(tmp_path, storage):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        claimed = [run for runs in pool.map(claim_all, [(tmp_path, storage)] * 2) for run in runs]
    assert sorted(claimed) == sorted(task.run for task in TASKS)
    assert claim_all((tmp_path, storage)) == []


def expire(shared, trial):
    """Age a claim, as if its worker had been suspended."""
    if isinstance(shared.storage, RDBStorage):
        with shared.storage.engine.begin() as connection:
            connection.execute(text("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'"))
    else:
        os.utime(shared.leases / str(trial.number), (0, 0))


@pytest.fixture
def long_lease(monkeypatch):
    """Seconds of a lease that outlasts any stall of the machine, renewed ten times a second."""
    monkeypatch.setattr("effnet_fast.search.trials.RENEWALS", 36_000)
    return 3600.0


@pytest.mark.parametrize("storage", STORAGES)
def test_claim_expires_unless_renewed(tmp_path, long_lease, storage):
    first, second = (trials(tmp_path, storage, lease_seconds=long_lease) for _ in range(2))
    second.owner = "elsewhere:1"
    first.enqueue(TASKS[:1])
    trial = first.claim()
    with first.renewing(trial) as lost:
        expire(first, trial)
        while first._is_expired(trial):
            time.sleep(0.05)
        assert second.claim() is None
        assert not lost.is_set()
    assert second.claim() is None
    expire(first, trial)
    again = second.claim()
    assert again.number == trial.number
    assert again.params == TASKS[0].params
    assert [state.state for state in second.states()] == ["RUNNING"]


def test_worker_notices_a_lost_claim(tmp_path, long_lease):
    first, second = (trials(tmp_path, lease_seconds=long_lease) for _ in range(2))
    second.owner = "elsewhere:1"
    first.enqueue(TASKS[:1])
    trial = first.claim()
    expire(first, trial)
    assert second.claim() is not None
    with first.renewing(trial) as lost:
        assert lost.wait()


@pytest.mark.parametrize("storage", STORAGES)
def test_released_claim_is_free_at_once(tmp_path, storage):
    shared = trials(tmp_path, storage)
    shared.enqueue(TASKS[:1])
    trial = shared.claim()
    assert shared.claim() is None
    shared.release(trial)
    assert shared.claim().number == trial.number


@pytest.fixture(params=STORAGES)
def lost(request, tmp_path):
    """Two workers and a trial that the first has claimed and lost to the second, as each of them sees it."""
    first, second = trials(tmp_path, request.param), trials(tmp_path, request.param)
    second.owner = "elsewhere:1"
    first.enqueue(TASKS[:1])
    trial = first.claim()
    expire(first, trial)
    return first, second, trial, second.claim()


def test_a_lost_claim_cannot_be_released(lost):
    first, _, trial, again = lost
    assert again.number == trial.number
    first.release(trial)
    assert first.claim() is None


def test_a_lost_claim_cannot_be_finished(lost):
    first, second, trial, again = lost
    with pytest.raises(Lost):
        first.finish(trial, "COMPLETE", 1.0, latency_ms=1.0)
    second.finish(again, "COMPLETE", 2.0)
    with pytest.raises(Lost):
        first.finish(trial, "FAIL")
    (state,) = first.states()
    assert (state.state, state.top1) == ("COMPLETE", 2.0)


def test_a_trial_that_ends_is_never_abandoned(tmp_path):
    """Between the end of a trial and that of its lease, no other worker looks at it."""
    first, second = trials(tmp_path), trials(tmp_path)
    first.enqueue(TASKS[:1])
    trial = first.claim()
    with ThreadPoolExecutor(1) as pool:
        with second.lock:
            ending = pool.submit(first.finish, trial, "COMPLETE", 1.0)
            with pytest.raises(TimeoutError):
                ending.result(timeout=0.3)
            assert [state.state for state in second.states()] == ["RUNNING"]
        ending.result()
    assert [state.state for state in second.states()] == ["COMPLETE"]


def test_tasks_can_be_added(tmp_path):
    shared = trials(tmp_path)
    shared.enqueue(TASKS[:2])
    shared.enqueue(TASKS)
    assert len(shared.states()) == len(TASKS)


def test_study_of_another_plan_is_refused(tmp_path):
    trials(tmp_path)
    with pytest.raises(ValueError, match="another plan: choose another --run_name"):
        trials(tmp_path, digest="other")


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////no/such/folder/search.db", "postgresql://nowhere/x"])
def test_storage_that_cannot_be_opened_is_one_line(tmp_path, storage):
    with pytest.raises(ValueError, match="give `journal` or a database URL") as error:
        trials(tmp_path, storage)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql://me:s3cret@nowhere/x",
        "nonsense://me:s3cret@nowhere/x",
        "postgresql+nodriver://nowhere/x?user=me&password=s3cret",
        "sqlite:////no/such/folder/search.db?password=s3cret",
        "sqlite://me:s3cret@nowhere:port/search.db",
    ],
)
def test_storage_error_hides_the_password(tmp_path, storage):
    with pytest.raises(ValueError, match=r"--storage .*\*\*\*") as error:
        trials(tmp_path, storage)
    assert "s3cret" not in "".join(traceback.format_exception(error.value))


def test_database_that_fails_later_is_one_line(tmp_path):
    storage = "postgresql://me:s3cret@host/x"
    with (
        pytest.raises(ValueError, match=r"^--storage postgresql://me:\*\*\*@host/x: gone; check$"),
        explain_errors(storage, "check"),
    ):
        raise StorageInternalError("gone")
    with pytest.raises(StorageInternalError), explain_errors("journal", "check"):
        raise StorageInternalError("gone")


def test_optuna_without_stale_trials(tmp_path):
    with pytest.raises(ValueError, match=r"install 'optuna>=4.2,<6'"):
        stale_trial_ids(object(), "search")


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_pruners(tmp_path, pruner):
    """Eight good trials, then a bad one."""
    shared = trials(tmp_path, pruner=pruner)
    shared.enqueue([Task(f"c{i}", 1.0, 1.0, 1.0, 0) for i in range(9)])
    pruned = []
    for i in range(9):
        trial = shared.claim()
        try:
            for epoch in range(1, 10):
                shared.report(trial, epoch, (1.0 if i == 8 else 50.0 + i) + epoch)
            shared.finish(trial, "COMPLETE", 1.0)
        except Pruned:
            pruned.append(i)
            shared.finish(trial, "PRUNED")
    assert (8 in pruned) == (pruner != "none")
    assert 7 not in pruned


def test_epoch_may_be_reported_twice(tmp_path):
    shared = trials(tmp_path)
    shared.enqueue(TASKS[:1])
    trial = shared.claim()
    shared.report(trial, 1, 10.0)
    shared.report(trial, 1, 10.0)
    assert [(state.epochs, state.top1) for state in shared.states()] == [(1, 10.0)]


def test_failed_trial_keeps_its_reason(tmp_path):
    shared = trials(tmp_path)
    shared.enqueue(TASKS[:1])
    shared.finish(shared.claim(), "FAIL", reason="out of memory")
    (state,) = shared.states()
    assert (state.state, state.attrs["reason"]) == ("FAIL", "out of memory")
    assert shared.claim() is None


def test_no_pruning_after_the_last_epoch(tmp_path):
    shared = trials(tmp_path, pruner="median")
    shared.enqueue([Task(f"c{i}", 1.0, 1.0, 1.0, 0) for i in range(9)])
    for i in range(8):
        trial = shared.claim()
        for epoch in range(1, 10):
            shared.report(trial, epoch, 50.0 + i)
        shared.finish(trial, "COMPLETE", 50.0 + i)
    last = shared.claim()
    shared.report(last, 7, 1.0, prune=False)
    with pytest.raises(Pruned):
        shared.report(last, 8, 1.0)
    shared.report(last, 9, 1.0)
