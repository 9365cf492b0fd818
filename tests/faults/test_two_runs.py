"""A second run in the same folder is refused."""

import signal
import time

import pytest

from effnet_fast import cli


def test_second_run_is_refused_until_the_first_ends(runs, small, capsys, monkeypatch):
    monkeypatch.setattr("effnet_fast.run.folder.PATIENCE", 0.2)
    first = runs.train("run", "--num_epochs 100000")
    first.wait_for("step 1/")
    line = f"{small} --save_dir {runs.folder} --run_name run --num_epochs 100000 --time_budget 0.01"
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: another run is at work in {runs.folder}/run: ")
    assert printed.count("\n") == 1
    assert first.process.poll() is None
    first.kill()  # -9: nothing can be tidied up, and the lock is free all the same
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 0


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
