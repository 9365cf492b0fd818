"""Experiment trackers. Stand-ins of wandb and mlflow, in tests/shared/stand_ins, record what they are told."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import run
from effnet_fast.train import trackers
from effnet_fast.train.trackers import TrackedRun, Trackers

STAND_INS = Path(__file__).parents[1] / "shared" / "stand_ins"
TINY = (
    "train --dataset synthetic --limit_train 24 --limit_eval 8 --batch_size 8 --num_epochs 2 --output_stride 32 "
    "--width 0.25 --depth 0.3 --loader resident --num_workers 1 --log_every_steps 1 --device cpu --run_name tracked"
)
FILES = ["config.yaml", "environment.json", "metrics.jsonl", "curves.png"]


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.syspath_prepend(STAND_INS)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "mlflow")]:
            del sys.modules[name]

    forget()
    yield importlib.import_module("wandb"), importlib.import_module("mlflow")
    forget()


def test_a_resumed_run_goes_on_in_the_same_one(stand_ins, tmp_path):
    wandb, mlflow = stand_ins
    line = f"{TINY} --tracker tensorboard,wandb,mlflow --save_dir {tmp_path}"
    run(f"{line} --time_budget 0.001", curves=True)
    run(line, curves=True)
    rows = [json.loads(line) for line in (tmp_path / "tracked" / "metrics.jsonl").read_text().splitlines()]

    ((first, second),) = wandb.runs.values()
    told = [row for opened in (first, second) for row in opened.rows]
    assert [row["step"] for row in told] == [row["step"] for row in rows]
    assert told[-1] == {"step": 6} | {f"test/{name}": rows[-1][name] for name in ("loss", "top1", "top5", "seconds")}
    assert (first.name, first.config["batch_size"], first.config["run_name"]) == ("tracked", 8, "tracked")
    assert "torch" in first.config
    assert (first.exit_code, second.exit_code, second.files) == (0, 0, FILES)

    (tracked,) = mlflow.runs.values()
    assert (tracked.name, tracked.status, tracked.params["batch_size"]) == ("tracked", "FINISHED", "8")
    assert tracked.files[-4:] == FILES
    assert {m.step: m.value for m in tracked.metrics if m.key == "train/loss"} == {
        row["step"]: row["loss"] for row in rows if row["kind"] == "train"
    }
    events = EventAccumulator(str(tmp_path / "tracked" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    run(f"{line} --resume no --time_budget 0.001")
    assert len(wandb.runs) == len(mlflow.runs) == 2


class Failing:
    """A tracker that raises in one of its methods."""

    def __init__(self, method):
        self.method, self.calls = method, []

    def call(self, method):
        self.calls.append(method)
        if method == self.method:
            raise RuntimeError(f"no {method} today\nwith details")

    def log(self, figures, step):
        self.call("log")

    def add_files(self, files):
        self.call("add_files")

    def close(self, status):
        self.call("close")


@pytest.mark.parametrize("method", ["open", "log", "add_files", "close"])
def test_a_failing_tracker_is_turned_off(monkeypatch, tmp_path, method):
    opened, warnings = [], []

    def kind(method):
        def open_tracker(run):
            opened.append(Failing(method))
            opened[-1].call("open")
            return opened[-1]

        return open_tracker

    monkeypatch.setattr(trackers, "KINDS", {"failing": kind(method), "good": kind(None)})
    with Trackers(["failing", "good"], TrackedRun(tmp_path, "run", {}, 0), warnings.append) as active:
        for step in range(2):
            active.log({"train/loss": 1.0}, step)
        active.add_files([])
    assert warnings == [
        f"warning: the tracker failing failed and is off from here on (RuntimeError: no {method} today); "
        "metrics.jsonl has all figures"
    ]
    failing, good = opened
    assert good.calls == ["open", "log", "log", "add_files", "close"]
    assert failing.calls.count(method) == 1
    assert failing.calls[-1] == method


def test_status_of_a_run_that_raises(stand_ins, tmp_path):
    _, mlflow = stand_ins
    with pytest.raises(FloatingPointError), Trackers(["mlflow"], TrackedRun(tmp_path, "run", {}, 0), pytest.fail):
        raise FloatingPointError
    assert mlflow.runs["run0"].status == "FAILED"


def test_none_and_mistakes(tmp_path, capsys, monkeypatch):
    run(f"{TINY} --tracker none --num_epochs 1 --save_dir {tmp_path}")
    assert not (tmp_path / "tracked" / "tensorboard").exists()
    capsys.readouterr()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for flag, words in (
        ("neptune", "--tracker neptune: choose among tensorboard, wandb, mlflow, or none"),
        ("wandb", "--tracker wandb: wandb is not installed: pip install 'effnet-fast[wandb]'"),
    ):
        run(f"{TINY} --tracker {flag} --save_dir {tmp_path}", expected=2)
        assert capsys.readouterr().err == f"error: {words}\n"
