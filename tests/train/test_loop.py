"""When a checkpoint is due, and what stops a run."""

import os
import signal

import pytest
import torch

from effnet_fast.distributed import World
from effnet_fast.train import stop as stop_module
from effnet_fast.train.meters import Meters
from effnet_fast.train.stop import SaveDue, Stop

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(stop_module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_checkpoints_come_every_so_many_steps():
    due = SaveDue(ALONE, steps=3, minutes=0)
    assert [step for step in range(1, 11) if due(step)] == [3, 6, 9]
    assert not any(map(SaveDue(ALONE, steps=0, minutes=0), range(1, 11)))


def test_checkpoints_come_every_so_many_minutes(clock):
    due = SaveDue(ALONE, steps=0, minutes=2)
    found = []
    for step in range(1, 11):
        clock.now += 50
        found += [step] * due(step)
    assert found == [3, 6, 9]


def test_minutes_count_from_the_last_checkpoint(clock):
    due = SaveDue(ALONE, steps=4, minutes=2)
    found = []
    for step in range(1, 11):
        clock.now += 50
        found += [step] * due(step)
    assert found == [3, 4, 7, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_caught_and_given_back(number):
    before = signal.getsignal(number)
    with Stop(ALONE) as stop:
        os.kill(os.getpid(), number)
        assert stop.asked(1)
        assert stop.signal == number
        assert not stop.out_of_time
        assert stop.status == 128 + number
    assert signal.getsignal(number) == before


def test_a_rank_that_stops_for_anothers_signal_does_not_count_as_done(monkeypatch):
    """torchrun takes 0 for the end of the run, and would let the rest of an elastic one end unfinished."""
    monkeypatch.setattr(stop_module.distributed, "any_rank", lambda flag, device: True)
    with Stop(ALONE) as stop:
        assert stop.asked(1)
        assert not stop.out_of_time
    assert stop.status == 128 + signal.SIGTERM


def test_a_second_ctrl_c_interrupts_at_once_but_not_under_torchrun(monkeypatch):
    with Stop(ALONE) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with Stop(ALONE) as stop:
        for _ in range(3):  # torchrun passes on what the terminal has sent already
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_saved_meters_go_to_one_rank_and_the_sum_stays():
    meters = [Meters(ALONE.device) for _ in range(3)]
    for rank in range(3):
        meters[rank].add_batch(torch.tensor(6.0), torch.tensor(3), 12)
        meters[rank].add_step(torch.tensor(2.0), torch.tensor(False), torch.tensor(False), 0)
    saved = meters[0].collect()
    for rank in range(3):
        meters[rank].restore(saved, rank)
    readings = [meter.read() for meter in meters]
    assert [reading.images for reading in readings] == [12, 0, 0]
    assert [reading.grad_norm for reading in readings] == [2.0, 2.0, 2.0]
