"""The watchdog reports a rank that makes no progress, with its stack."""

import math
import os
import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from effnet_fast.distributed import World
from effnet_fast.train import watchdog as watchdog_module
from effnet_fast.train.watchdog import EXIT_STATUS, Watchdog

CPU = torch.device("cpu")


class Clock(threading.Event):
    """Clock and polled event of the watchdogs. A poll takes no real time; time passes only when the test says so."""

    def __init__(self):
        super().__init__()
        self.now, self.until = 0.0, 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def wait(self, timeout=None):
        ended = super().wait(0.001)
        if self.now < self.until:
            self.now += timeout
        return ended

    def run(self, seconds=math.inf):
        """Let some seconds pass and wait for them; without a number, let time run on."""
        self.until = self.now + seconds
        while math.isfinite(seconds) and self.now < self.until:
            time.sleep(0.001)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    return clock


def watchdog(clock, *arguments, **options):
    watchdog = Watchdog(*arguments, **options)
    watchdog._done = clock
    return watchdog


def make_no_progress(until):
    while not until.is_set():
        time.sleep(0.01)


def test_rank_without_progress_reports_its_stack(capsys, clock):
    ended = threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    with watchdog(clock, World(0, 1, CPU), 1.0, exit_process=end) as watched:
        for _ in watched.watch([1, 2, 3], "epoch 5", number=7):
            clock.run(0.5)
        watched.progress("epoch 6, loading batch 2")
        clock.run(0.9)
        assert statuses == []
        clock.run()
        make_no_progress(ended)
    assert statuses == [EXIT_STATUS]
    message = capsys.readouterr().err
    assert re.search(rf"rank 0 \(host \S+, process {os.getpid()}\) has made no progress for \d+ s", message)
    assert "at epoch 6, loading batch 2" in message
    assert "in make_no_progress" in message


def test_progress_resets_the_limit(clock):
    statuses = []
    with watchdog(clock, World(0, 1, CPU), 1.5, exit_process=statuses.append) as watched:
        for number in range(25):
            watched.progress(f"batch {number}")
            clock.run(1.0)
    assert statuses == []


def test_rank_without_heartbeat_is_reported_by_the_first_other(capsys, clock):
    store, ended = dist.HashStore(), threading.Event()
    with Watchdog(World(1, 3, CPU), 6000, store) as silent:  # sends one heartbeat, like a process that is then stopped
        silent.progress("epoch 1, computing batch 4")
        while not store.check(["effnet_fast/heartbeat/1"]):
            time.sleep(0.01)
        with watchdog(clock, World(0, 3, CPU), 0.8, store, exit_process=lambda status: ended.set()) as watched:
            while 1 not in watched._heartbeats:
                time.sleep(0.01)
            clock.run()
            make_no_progress(ended)
    message = capsys.readouterr().err
    assert re.search(r"rank 1 \(host .*\) has sent no heartbeat for \d+ s; it was at ", message)
    assert "rank 2 has sent no heartbeat at all" in message


def test_unreachable_store_is_reported_alone(capsys):
    class Gone(dist.HashStore):
        def set(self, key, value):
            raise RuntimeError("the store's host is gone")

    ended = threading.Event()
    with Watchdog(World(1, 3, CPU), 0.8, Gone(), exit_process=lambda status: ended.set()):
        make_no_progress(ended)
    message = capsys.readouterr().err
    assert "rank 0, which stores the heartbeats, does not answer" in message
    assert "rank 2" not in message


def test_zero_turns_it_off():
    before = threading.active_count()
    with Watchdog(World(0, 1, CPU), 0):
        assert threading.active_count() == before


@pytest.mark.slow
def test_stopped_rank_is_reported_and_torchrun_restarts(runs):
    """SIGSTOP of one of two ranks: the other reports it; torchrun restarts both, and they finish.

    Ranks take up to half a minute to start again on a busy machine.
    """
    run = runs.train(
        "stopped",
        "--num_epochs 6 --save_every_steps 1 --hang_timeout 60",
        ranks=2,
        options="--max-restarts 3",
    )
    run.wait_for("step 8/")
    ranks = children(run.process.pid)
    assert len(ranks) == 2
    victim = next(pid for pid in ranks if environment(pid)["RANK"] == "1")
    os.kill(victim, signal.SIGSTOP)
    line = run.wait_for("has sent no heartbeat")
    assert f"rank 1 (host {os.uname().nodename}, process {victim})" in line
    assert "rank 0 (host" in run.printed
    assert run.end() == 0, run.printed
    assert "resuming at step" in run.printed
    assert [row["step"] for row in runs.rows("stopped")] == list(range(1, 37))


@pytest.mark.slow
def test_sleeping_rank_reports_its_stack(runs, tmp_path):
    """One of two ranks sleeps for ever within an epoch, like a loader on a disk that does not answer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "from effnet_fast.data import resident\n"
        "original = resident.ResidentLoader.epoch\n"
        "def wait_for_a_dead_disk():\n"
        "    time.sleep(1e6)\n"
        "def epoch(self, number, start=0):\n"
        "    for i, batch in enumerate(original(self, number, start)):\n"
        "        if (number, i, os.environ['RANK']) == (0, 2, '1'):\n"
        "            wait_for_a_dead_disk()\n"
        "        yield batch\n"
        "if 'RANK' in os.environ:\n"
        "    resident.ResidentLoader.epoch = epoch\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = runs.train("asleep", "--hang_timeout 15", ranks=2, PYTHONPATH=path)
    assert run.end() != 0
    assert re.search(r"rank 1 \(host .*at epoch 1, loading batch 2; its stack:", run.printed)
    assert "in wait_for_a_dead_disk" in run.printed
    assert re.search(r"rank 0 \(host .*at epoch 1, computing batch [12]", run.printed)


def children(pid):
    """The training processes below one of torchrun."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(word) for word in file.read().split()]
    return [child for child in found if "RANK" in environment(child)]


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return dict(entry.decode().split("=", 1) for entry in file.read().split(b"\0") if b"=" in entry)
