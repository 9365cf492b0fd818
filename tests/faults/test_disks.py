"""Full and read-only disks: the old checkpoint stays; training continues, and stops after two failed writes."""

import dataclasses
import errno
import os
import subprocess
import threading
import time

import pytest
import torch

from command_line import run
from effnet_fast import checkpoint, cli, create_model
from effnet_fast.config import TrainConfig
from effnet_fast.data import load_dataset
from effnet_fast.train import record
from effnet_fast.train.writer import Writer, snapshot


class Disk:
    """Stands for the disk under checkpoints: it can be full, or slow."""

    def __init__(self, monkeypatch):
        self.full = False
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Event()
        fsync = os.fsync

        def slow_fsync(descriptor):
            self.writing.set()
            self.gate.wait()
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", slow_fsync)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def settle(writer):
    """Wait until nothing is left to write."""
    while True:
        with writer._changed:
            if not writer._pending and not writer._busy:
                return
        time.sleep(0.005)


def test_save_does_not_wait_for_the_disk(tmp_path, disk):
    weights = torch.zeros(1000)
    with Writer(tmp_path, keep=1, warn=pytest.fail) as writer:
        disk.gate.clear()
        for step in range(20):
            weights.fill_(step)
            writer.save({"step": step, "weights": weights}, best=step == 3)
            disk.writing.wait()
        weights.fill_(-1)  # what training does meanwhile must not reach the file
        disk.gate.set()
    last, best = checkpoint.load(tmp_path / "last.pt"), checkpoint.load(tmp_path / "best.pt")
    assert (last["step"], best["step"]) == (19, 3)
    assert torch.equal(last["weights"], torch.full((1000,), 19.0))
    assert torch.equal(best["weights"], torch.full((1000,), 3.0))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_older_checkpoints_are_kept(tmp_path):
    with Writer(tmp_path, keep=3, warn=pytest.fail) as writer:
        for step in range(5):
            writer.save({"step": step})
            settle(writer)
    kept = checkpoint.generations(tmp_path / "last.pt")
    assert [path.name for path in kept] == ["last.pt", "last-1.pt", "last-2.pt"]
    assert [checkpoint.load(path)["step"] for path in kept] == [4, 3, 2]
    checkpoint.write_atomically(tmp_path / "last.pt", checkpoint.serialise({"step": 5}), keep=2)
    assert [path.name for path in checkpoint.generations(tmp_path / "last.pt")] == ["last.pt", "last-1.pt"]
    with Writer(tmp_path, keep=1, warn=pytest.fail) as writer:
        writer.save({"step": 6})
    assert checkpoint.generations(tmp_path / "last.pt") == [tmp_path / "last.pt"]


def test_the_only_checkpoint_survives_a_failed_write(tmp_path, monkeypatch):
    """Older ones are deleted once the new one is in place."""

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "last-1.pt").write_bytes(b"the only one")
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="the one before it is kept"):
        checkpoint.write_atomically(tmp_path / "last.pt", b"new", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["last-1.pt"]


def test_best_is_written_before_last(tmp_path, monkeypatch):
    """last.pt contains the best score, so a resumed run relies on best.pt being there."""
    wrote = []
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, *_: wrote.append(path.name))
    with Writer(tmp_path, keep=1, warn=pytest.fail) as writer:
        writer.save({"step": 1}, best=True)
    assert wrote == ["best.pt", "last.pt"]


def test_one_failed_write_is_a_warning(tmp_path, disk):
    warnings = []
    with Writer(tmp_path, keep=1, warn=warnings.append) as writer:
        writer.save({"step": 1}, best=True)
        settle(writer)
        disk.full = True
        writer.save({"step": 2}, best=True)
        settle(writer)
        writer.check()
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
        disk.full = False
        writer.save({"step": 3})
    assert len(warnings) == 1
    assert "(No space left on device); the one before it is kept: free some space" in warnings[0]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2  # the best is not forgotten
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_second_failed_write_raises(tmp_path, disk):
    warnings = []
    writer = Writer(tmp_path, 2, warnings.append)
    for step, full in ((1, False), (2, True), (3, True)):
        disk.full = full
        writer.save({"step": step})
        settle(writer)
    with pytest.raises(OSError, match="No space left on device"):
        writer.check()
    with pytest.raises(OSError, match="No space left on device"):
        writer.save({"step": 4})
    assert len(warnings) == 1
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_failed_last_write_raises(tmp_path, disk):
    disk.full = True
    with pytest.raises(OSError, match="No space left"), Writer(tmp_path, 2, lambda line: None) as writer:
        writer.save({"step": 1})


def test_other_errors_of_a_write_are_raised(tmp_path):
    with pytest.raises(Exception, match="pickle"), Writer(tmp_path, 2, lambda line: None) as writer:
        writer.save({"step": lambda: None})


def test_snapshot_is_a_copy():
    state = {"a": [torch.ones(2), (torch.zeros(3), "x")], "n": 1, "none": None}
    copied = snapshot(state)
    state["a"][0].fill_(5)
    state["a"].append(1)
    assert torch.equal(copied["a"][0], torch.ones(2))
    assert len(copied["a"]) == 2
    assert copied["a"][1][1] == "x"


def test_rows_are_written_after_a_full_disk(tmp_path, tmpfs, fill):
    warnings = []
    disk = tmpfs(1)
    lines = record.Lines(disk / "metrics.jsonl", warnings.append)
    lines.add("one")
    filler = fill(disk, leave=0)
    for word in ("two" * 2000, "three" * 2000):
        lines.add(word)
    assert len(warnings) == 1
    filler.unlink()
    lines.add("four")
    lines.close()
    assert (disk / "metrics.jsonl").read_text().split() == ["one", "two" * 2000, "three" * 2000, "four"]


def test_read_only_folder(tmpfs, small, capsys):
    disk = tmpfs(4)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(SystemExit) as done:
        cli.main(f"{small} --save_dir {disk} --run_name none".split())
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"error: cannot write to {disk}/none (Read-only file system): choose another --save_dir\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_disk_full_for_a_while(runs, tmpfs, fill, seed):
    disk = tmpfs(24)
    run = runs.train("full", f"--save_dir {disk} --num_epochs 12")
    run.wait_for(f"step {8 + seed}/")
    filler = fill(disk, leave=2000)
    run.wait_for("warning: cannot write")
    filler.unlink()
    assert run.end() == 0, run.printed
    assert "Traceback" not in run.printed
    assert checkpoint.load(disk / "full" / "last.pt")["progress"]["finished"]
    rows = (disk / "full" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 72 + 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_disk_that_stays_full(runs, tmpfs, fill, seed):
    disk = tmpfs(24)
    run = runs.train("full", f"--save_dir {disk} --num_epochs 40")
    run.wait_for(f"step {8 + seed}/")
    filler = fill(disk, leave=2000)
    assert run.end() == 2, run.printed
    assert "Traceback" not in run.printed
    assert "free some space and run the same command again" in run.printed.splitlines()[-1]
    assert checkpoint.load(disk / "full" / "last.pt")["progress"]["step"] in (6, 12)
    filler.unlink()
    again = runs.train("full", f"--save_dir {disk} --num_epochs 40")
    assert again.end() == 0, again.printed
    assert "resuming at step" in again.printed


def test_outputs_beside_read_only_files_name_the_flag(tmpfs, capsys):
    """As on Kaggle, where data and checkpoints lie in a read-only folder."""
    disk = tmpfs(16)
    model = create_model("efficientnet-b0", width=0.25, depth=0.3)
    state = {
        "model": model.state_dict(),
        "ema": None,
        "config": dataclasses.asdict(TrainConfig(dataset="synthetic")),
        "architecture": dataclasses.asdict(model.architecture),
        "classes": list(load_dataset("synthetic", "").classes),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    checkpoint.save(disk / "last.pt", state)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for line, flag in (
        (f"eval --checkpoint {disk}/last.pt --device cpu", "--output_dir"),
        (f"export --checkpoint {disk}/last.pt", "--output"),
        (f"data --dataset synthetic --data_dir {disk}", "--output"),
    ):
        run(line, expected=2)
        message = f"error: cannot write to {disk} (Read-only file system): choose another {flag}\n"
        assert capsys.readouterr().err == message


def test_last_rows_are_written_at_the_end(tmp_path, tmpfs, fill):
    warnings = []
    disk = tmpfs(1)
    lines, other = (record.Lines(disk / name, warnings.append) for name in ("metrics.jsonl", "other.jsonl"))
    filler = fill(disk, leave=0)
    for each in (lines, other):
        each.add("last" * 2000)
    other.close()
    filler.unlink()
    lines.close()
    assert (disk / "metrics.jsonl").read_text() == "last" * 2000 + "\n"
    assert [warning.partition("; ")[2] for warning in warnings] == [
        "its rows are kept and written later",
        "its rows are kept and written later",
        "its last rows are lost",
    ]
