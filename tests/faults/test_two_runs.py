"""Two runs in one folder would write over each other: the second is refused."""

import signal
import time

import pytest

from effnet_fast import cli


def test_a_second_run_is_refused_until_the_first_is_gone(runs, small, capsys, monkeypatch):
    monkeypatch.setattr("effnet_fast.run.folder.PATIENCE", 0.2)
    first = runs.train("run", "--num_epochs 100000")
    first.wait_for("step 1/")
    line = f"{small} --save_dir {runs.folder} --run_name run --num_epochs 100000 --time_budget 0.01"
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: another run is at work in {runs.folder}/run: ")
    assert said.count("\n") == 1
    assert first.process.poll() is None
    first.kill()  # -9: nothing can be tidied up, and the lock is free all the same
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_of_two_runs_started_at_once_one_is_refused(runs, attempt):
    both = [runs.train("run", "--num_epochs 100000") for _ in range(2)]
    while all(run.process.poll() is None for run in both):
        time.sleep(0.05)
    refused, first = sorted(both, key=lambda run: run.process.poll() is None)
    assert refused.end() == 2
    assert "another run is at work" in refused.said
    first.wait_for("step 1/")
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM
    assert "another run is at work" not in first.said
