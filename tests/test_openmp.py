"""Sharing the cores with other processes: settings, detection of others, and the switch of libgomp's spinning."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from effnet_fast import openmp


@pytest.fixture
def before_torch(monkeypatch):
    monkeypatch.setattr(openmp, "sys", SimpleNamespace(modules={}))


@pytest.mark.parametrize(("quota", "threads"), [(2.5, "2"), (0.5, "1"), (8.0, None), (None, None)])
def test_threads_follow_the_quota(before_torch, monkeypatch, quota, threads):
    monkeypatch.setattr(openmp, "cpu_quota", lambda: quota)
    monkeypatch.setattr(openmp, "_cores", lambda: 8)
    environment = {}
    openmp.limit_threads(environment)
    assert environment.get("OMP_NUM_THREADS") == threads
    openmp.limit_threads(environment := {"OMP_NUM_THREADS": "7"})
    assert environment["OMP_NUM_THREADS"] == "7"


def test_after_torch_nothing_is_set(monkeypatch):
    monkeypatch.setattr(openmp, "cpu_quota", lambda: 0.5)
    openmp.limit_threads(environment := {})
    assert environment == {}


def test_the_package_sets_it_before_torch_is_imported():
    """The quota is read again in `import effnet_fast`, after which torch is not imported yet."""
    code = (
        "import os, sys, pathlib; os.environ.pop('OMP_NUM_THREADS', None); os.sched_getaffinity = lambda _: range(64);"
        "pathlib.Path.read_text = lambda path: '300000 100000'; import effnet_fast;"
        "print('torch' in sys.modules, os.environ['OMP_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3"]


def test_quota_of_cgroups(tmp_path):
    assert openmp.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert openmp.cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    assert openmp.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert openmp.cpu_quota(tmp_path) == 2.0
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert openmp.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "threads", "busy", "mine", "contended"),
    [
        (2, 2, 4.0, 4.0, False),  # alone
        (2, 2, 4.0, 2.0, True),  # another process uses half of the time
        (2, 2, 4.2, 4.0, False),  # other processes use little
        (2, 1, 4.0, 2.0, False),  # one thread never spins
        (8, 2, 8.0, 4.0, False),  # there are cores for both
        (8, 6, 16.0, 9.0, True),
    ],
)
def test_contention(monkeypatch, cores, threads, busy, mine, contended):
    """Two seconds in which the cores were busy for `busy` seconds, `mine` of them by this process."""
    samples = iter([(10.0, 100.0, 20.0), (12.0, 100.0 + busy, 20.0 + mine)])
    monkeypatch.setattr(openmp.Load, "_sample", lambda self: next(samples))
    monkeypatch.setattr(openmp, "_cores", lambda: cores)
    assert openmp.Load().is_contended(threads) is contended


def test_this_machine_has_a_load():
    load = openmp.Load()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    seconds, busy, mine = (now - before for now, before in zip(load._sample(), load._last, strict=True))
    assert seconds > 0
    assert mine >= 0.1
    assert busy > 0


@pytest.fixture
def teams(monkeypatch):
    """Counts of idle teams, as the monitor starts and stops them by a load that the test sets."""
    state = SimpleNamespace(contended=False, alive=0, polled=threading.Semaphore(0))

    class Load:
        def is_contended(self, threads):
            state.polled.release()
            return state.contended

    def start():
        state.alive += 1
        return SimpleNamespace(stop=lambda: setattr(state, "alive", state.alive - 1))

    monkeypatch.setattr(openmp, "Load", Load)
    monkeypatch.setattr(openmp.IdleTeam, "start", start)
    monkeypatch.setattr(openmp, "POLL_SECONDS", 0.001)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    return state


def polls(state, number=3):
    for _ in range(number):
        state.polled.acquire()


def test_a_team_is_kept_while_the_cores_are_contended(teams):
    with openmp.share_cores():
        polls(teams)
        assert teams.alive == 0
        teams.contended = True
        polls(teams)
        assert teams.alive == 1
        teams.contended = False
        polls(teams)
        assert teams.alive == 0
        teams.contended = True
        polls(teams)
    assert teams.alive == 0


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "5"), ("OMP_WAIT_POLICY", "passive")])
def test_settings_of_the_user_turn_it_off(teams, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    before = threading.active_count()
    with openmp.share_cores():
        assert threading.active_count() == before


def test_an_idle_team_has_more_threads_than_cores():
    if openmp._libgomp_path() is None:
        pytest.skip("torch uses another OpenMP library here")

    def threads():
        return len(os.listdir("/proc/self/task"))

    expected = torch.ones(1000).sum()
    before = threads()
    team = openmp.IdleTeam.start()
    try:
        while not team.is_asleep():
            pass
        assert threads() >= before + openmp._cores() + 1
        assert torch.ones(1000).sum() == expected
    finally:
        team.stop()
    while threads() > before:  # libgomp ends its threads with the one that owns them
        pass
