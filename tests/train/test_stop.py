"""Save intervals, signals and time budgets."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from effnet_fast.distributed import World
from effnet_fast.train import stop as stop_module
from effnet_fast.train.stop import SaveDue, Stop

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(stop_module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_save_every_few_steps():
    due = SaveDue(ALONE, steps=3, minutes=0)
    assert [step for step in range(1, 11) if due(step)] == [3, 6, 9]
    assert not any(map(SaveDue(ALONE, steps=0, minutes=0), range(1, 11)))


@pytest.mark.parametrize(("steps", "expected"), [(0, [3, 6, 9]), (4, [3, 4, 7, 8])])
def test_minutes_count_from_the_last_save(clock, steps, expected):
    due = SaveDue(ALONE, steps=steps, minutes=2)
    saved = []
    for step in range(1, 11):
        clock.now += 50
        saved += [step] * due(step)
    assert saved == expected


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_signal_is_handled_and_its_handler_restored(number):
    before = signal.signal(number, handler := lambda *_: None)  # under nohup SIGHUP would be ignored
    with Stop(ALONE) as stop:
        os.kill(os.getpid(), number)
        assert stop.requested(1)
        assert stop.signal == number
        assert not stop.out_of_time
        assert stop.status == 128 + number
    assert signal.signal(number, before) == handler


def test_status_when_another_rank_got_the_signal(monkeypatch):
    """torchrun takes status 0 for a finished run, and would not restart the other ranks."""
    monkeypatch.setattr(stop_module.distributed, "any_rank", lambda flag, device: True)
    with Stop(ALONE) as stop:
        assert stop.requested(1)
        assert not stop.out_of_time
    assert stop.status == 128 + signal.SIGTERM


def test_second_ctrl_c_interrupts_except_under_torchrun(monkeypatch):
    with Stop(ALONE) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with Stop(ALONE) as stop:
        for _ in range(3):  # torchrun forwards what the terminal has already sent
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_ignored_sighup_stays_ignored():
    """nohup ignores SIGHUP before it starts a program."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(ALONE) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_thread_leaves_signals_to_the_main_thread():
    """As when a server trains in a thread."""

    def stopped():
        with Stop(ALONE) as stop:
            return stop.requested(1)

    before = [signal.getsignal(number) for number in Stop.SIGNALS]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(stopped).result() is False
    assert [signal.getsignal(number) for number in Stop.SIGNALS] == before
