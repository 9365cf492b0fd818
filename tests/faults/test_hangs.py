"""A rank that no longer moves is named with its stack, within the time that was set."""

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
    """The watchdogs' clock, and the event they poll: a poll takes no real time, and only the test lets time pass."""

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
        """Let so many seconds pass, and wait for them; without a number, let time run."""
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


def stand_still(until):
    while not until.is_set():
        time.sleep(0.01)


def test_a_rank_that_stands_still_says_where(capsys, clock):
    ended = threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    with watchdog(clock, World(0, 1, CPU), 1.0, end=end) as watched:
        for _ in watched.watch([1, 2, 3], "epoch 5", number=7):
            clock.run(0.5)
        watched.moved("epoch 6, loading batch 2")
        clock.run(0.9)
        assert statuses == []
        clock.run()
        stand_still(ended)
    assert statuses == [EXIT_STATUS]
    said = capsys.readouterr().err
    assert re.search(rf"rank 0 \(host \S+, process {os.getpid()}\) has not moved for \d+ s", said)
    assert "it was at epoch 6, loading batch 2" in said
    assert "in stand_still" in said


def test_a_rank_that_moves_is_left_alone(clock):
    statuses = []
    with watchdog(clock, World(0, 1, CPU), 1.5, end=statuses.append) as watched:
        for number in range(25):
            watched.moved(f"batch {number}")
            clock.run(1.0)
    assert statuses == []


def test_a_silent_rank_is_named_by_the_others(capsys, clock):
    board, ended = dist.HashStore(), threading.Event()
    with Watchdog(World(1, 3, CPU), 6000, board) as silent:  # gives one sign and then stands like a stopped process
        silent.moved("epoch 1, computing batch 4")
        while not board.check(["effnet_fast/sign/1"]):
            time.sleep(0.01)
        with watchdog(clock, World(0, 3, CPU), 0.8, board, end=lambda status: ended.set()) as watched:
            while 1 not in watched._seen:
                time.sleep(0.01)
            clock.run()
            stand_still(ended)
    said = capsys.readouterr().err
    assert re.search(r"rank 1 \(host .*\) gives no sign of life for \d+ s; it was last at ", said)
    assert "rank 2 gives no sign of life, and never gave one" in said


def test_where_the_board_is_silent_nobody_else_is_blamed(capsys):
    class Gone(dist.HashStore):
        def set(self, key, value):
            raise RuntimeError("the store's host is gone")

    ended = threading.Event()
    with Watchdog(World(1, 3, CPU), 0.8, Gone(), end=lambda status: ended.set()):
        stand_still(ended)
    said = capsys.readouterr().err
    assert "rank 0, which keeps the signs of life, does not answer" in said
    assert "rank 2" not in said


def test_zero_switches_it_off():
    before = threading.active_count()
    with Watchdog(World(0, 1, CPU), 0):
        assert threading.active_count() == before


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_goes_on_without_a_word_from_anyone(runs):
    """SIGSTOP of one of two ranks: the other names it; torchrun starts both again, and they finish."""
    run = runs.train(
        "stopped",
        "--num_epochs 6 --save_every_steps 1 --hang_timeout 20",
        ranks=2,
        options="--max-restarts 3",
    )
    run.wait_for("step 8/")
    ranks = children(run.process.pid)
    assert len(ranks) == 2
    victim = next(pid for pid in ranks if environment(pid)["RANK"] == "1")
    os.kill(victim, signal.SIGSTOP)
    line = run.wait_for("gives no sign of life")
    assert f"rank 1 (host {os.uname().nodename}, process {victim})" in line
    assert "rank 0 (host" in run.said
    assert run.end() == 0, run.said
    assert "resuming at step" in run.said
    assert [row["step"] for row in runs.rows("stopped")] == list(range(1, 37))


@pytest.mark.slow
def test_a_rank_that_sleeps_shows_its_line(runs, tmp_path):
    """One of two ranks sleeps for ever in the middle of an epoch, as a loader on a dead disk does."""
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
    assert re.search(r"rank 1 \(host .*it was at epoch 1, loading batch 2, and stands at:", run.said)
    assert "in wait_for_a_dead_disk" in run.said
    assert re.search(r"rank 0 \(host .*it was at epoch 1, computing batch [12]", run.said)


def children(pid):
    """The training processes below one of torchrun."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(word) for word in file.read().split()]
    return [child for child in found if "RANK" in environment(child)]


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return dict(entry.decode().split("=", 1) for entry in file.read().split(b"\0") if b"=" in entry)
