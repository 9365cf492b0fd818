"""A second run in the same folder is refused."""

import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock, Timeout

from command_line import mistake, run
from effnet_fast.run import training

HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_locked_folder_is_refused_until_its_lock_is_free(tmp_path, small, capsys, monkeypatch):
    monkeypatch.setattr("effnet_fast.run.folder.PATIENCE", 0.2)
    folder = tmp_path / "run"
    folder.mkdir()
    line = f"{small} --save_dir {tmp_path} --run_name run --num_epochs 100000 --time_budget 0.01"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        printed = mistake(capsys, line)
        assert printed.startswith(f"error: another run is at work in {folder}: ")
        holder.kill()  # -9: nothing can be tidied up, and the lock is free all the same
    run(line)


def test_a_run_holds_the_lock_while_it_trains(tmp_path, small, capsys, monkeypatch):
    def build(plan):
        with pytest.raises(Timeout):
            FileLock(plan.folder / ".lock").acquire(timeout=0)
        raise ValueError("the lock is held")

    monkeypatch.setattr(training, "build", build)
    run(f"{small} --save_dir {tmp_path} --run_name run", expected=2)
    assert "the lock is held" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_two_runs_started_at_once(runs, attempt):
    both = [runs.train("run", "--num_epochs 100000") for _ in range(2)]
    while all(run.process.poll() is None for run in both):
        time.sleep(0.05)
    refused, first = sorted(both, key=lambda run: run.process.poll() is None)
    assert refused.end() == 2
    assert "another run is at work" in refused.printed
    first.wait_for("step 1/")
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM
    assert "another run is at work" not in first.printed
