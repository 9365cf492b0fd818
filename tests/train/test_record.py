"""Rows of metrics.jsonl, TensorBoard events, and progress lines."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_fast.train import record
from effnet_fast.train.meters import Reading
from effnet_fast.train.resizing import ImageSizes
from effnet_fast.train.trackers import TrackedRun, Trackers

READING = Reading(loss=2.0, top1=50.0, images=24, grad_norm=1.0, skipped=0, bad_step=None)


def recorder(folder, step=0, main=True, trackers=None):
    device = torch.device("cpu")
    return record.Recorder(
        folder, main=main, device=device, step=step, total_steps=10, steps_per_epoch=5, trackers=trackers
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_later_and_incomplete_rows_are_deleted(tmp_path):
    good = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (2, 4, 6))
    (tmp_path / "metrics.jsonl").write_text(good + '{"kind": "tr')
    kept = recorder(tmp_path, step=4)
    kept.train(6, READING, 0.1, world=1)
    kept.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(record.time, "perf_counter", lambda: clock.seconds)
    return clock


def test_damaged_rows_are_deleted(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n5\n{"kind": "eval"}\n{"step": 2}\n')
    assert record._rows_until(tmp_path / "metrics.jsonl", 2) == [{"step": 1}, {"step": 2}]


def test_rate_and_waiting(tmp_path, clock):
    def slow_batches():
        for _ in range(3):
            clock.seconds += 0.03
            yield None, [0] * 8

    kept = recorder(tmp_path)
    for _ in kept.watch(slow_batches()):
        clock.seconds += 0.01
    kept.train(3, READING, 0.1, world=2)
    kept.close()
    row = rows(tmp_path)[0]
    assert row["wait_share"] == pytest.approx(0.75)
    assert row["img_per_s"] == pytest.approx(2 * 24 / 0.12)
    assert row["seconds"] == pytest.approx(0.12)
    assert row["epoch"] == 0.6


def test_a_report_ends_the_lap_of_its_batch(tmp_path, clock):
    """Its step counts, and the time that the report and a checkpoint take does not."""
    kept = recorder(tmp_path)
    for number, _ in enumerate(kept.watch([(None, [0] * 8)] * 3)):
        clock.seconds += 0.01
        kept.train(number + 1, READING, 0.1, world=1)
        clock.seconds += 5
    kept.close()
    assert [row["img_per_s"] for row in rows(tmp_path)] == [pytest.approx(800)] * 3


def test_estimated_time_counts_larger_images(tmp_path, clock, capsys):
    """5 of 10 steps, on images of half the side of the other 5, are a fifth of the work; then larger ones are timed."""
    sizes = ImageSizes((16, 32), (0, 5))
    kept = record.Recorder(
        tmp_path, main=True, device=torch.device("cpu"), step=0, total_steps=10, steps_per_epoch=5, work=sizes.pixels
    )
    clock.seconds += 60
    kept.train(5, READING, 0.1, world=1)
    clock.seconds += 30
    kept.train(6, READING, 0.1, world=1)
    kept.close()
    assert re.findall(r"ETA (\S+)", capsys.readouterr().out) == ["0:04:00", "0:02:00"]


def test_the_step_that_compiles_counts_neither_for_the_estimate_nor_for_the_summary(tmp_path, clock, capsys):
    kept = recorder(tmp_path)
    for step, _ in enumerate(kept.watch([(None, [0] * 8)] * 5), start=1):
        clock.seconds += 60 if step == 1 else 2
        if step in (1, 5):
            kept.train(step, READING, 0.1, world=1)
    kept.close()
    estimates = re.findall(r"ETA (\S+)", capsys.readouterr().out)
    assert estimates == ["unknown", "0:00:10"]
    assert kept.summary().startswith("trained at 4 img/s")
    assert [row["seconds"] for row in rows(tmp_path)] == [60, 8]


def test_summary(tmp_path, clock):
    kept = recorder(tmp_path)
    assert kept.summary() == "too short to measure the speed"
    for step in (3, 6):
        for _ in kept.watch([(None, [0] * 8)] * 3):
            clock.seconds += 0.01
        kept.train(step, READING, 0.1, world=1)
    kept.close()
    assert int(kept.summary().split()[2]) == 800
    assert kept.summary().endswith("img/s, 0 % of the time waiting for data")


class Device:
    """A device that the host runs ahead of: queued work takes time on the device only."""

    def __init__(self):
        self.time = 0.0

    def event(self, **_):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.at, self.is_passed = device, None, False

    def record(self):
        self.at = self.device.time

    def synchronize(self):
        self.is_passed = True

    def elapsed_time(self, end):
        assert end.is_passed, "CUDA raises an error"
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize(("loading", "computing", "share"), [(0.0, 0.3, 0.0), (0.1, 0.3, 0.25), (0.9, 0.1, 0.9)])
def test_cuda_events_measure_the_time(tmp_path, monkeypatch, loading, computing, share):
    """By the host's clock, a step would end when it is queued, and the rest would count as waiting."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    kept = record.Recorder(tmp_path, main=True, device=torch.device("cuda"), step=0, total_steps=10, steps_per_epoch=5)

    def batches():
        for _ in range(4):
            device.time += loading
            yield None, [0] * 8

    for _ in kept.watch(batches()):
        device.time += computing
    kept.train(4, READING, 0.1, world=1)
    kept.close()
    row = rows(tmp_path)[0]
    assert row["wait_share"] == pytest.approx(share)
    assert row["img_per_s"] == pytest.approx(8 / (loading + computing))


def test_tensorboard_gets_the_same_figures(tmp_path):
    with Trackers(["tensorboard"], TrackedRun(tmp_path, "run", {}, 0), pytest.fail) as trackers:
        kept = recorder(tmp_path, trackers=trackers)
        kept.train(5, READING, 0.1, world=1)
        kept.evaluation(5, {"split": "val", "loss": 1.0, "top1": 60.0, "top5": 80.0, "seconds": 1.0})
        kept.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/top1")[0].value == 50.0
    assert events.Scalars("val/top1")[0].step == 5


def test_other_ranks_write_nothing(tmp_path, capsys):
    kept = recorder(tmp_path, main=False)
    kept.train(5, READING, 0.1, world=2)
    kept.say("hello")
    kept.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_line_fits_80_columns(tmp_path, monkeypatch, capsys, clock, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    kept = recorder(tmp_path)
    clock.seconds = 1.0
    kept.train(5, READING, 0.1, world=1)
    kept.close()
    said = capsys.readouterr().out
    for words in ("loss 2.000", "top-1 50.0 %", "lr 0.1000", "img/s", "waiting", "ETA 0:00:"):
        assert words in said
    assert ("step 5/10" in said) is not terminal
